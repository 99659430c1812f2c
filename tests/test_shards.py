import json
import multiprocessing

import numpy as np
import pytest
import torch

from errors import UserError
from preprocessing import shards
from preprocessing.manifest import MANIFEST, FieldSpec, read_manifest, read_table, write_table
from preprocessing.shards import FieldReader, FieldWriter

SPEC = FieldSpec("latents", (2, 3), "float16", "test values", {"model": "m"}, {"kind": "aligned", "size": 8})
IDS = [f"n{i % 3}/{i}" for i in range(10)]


def value(key):
    """A value that only its id decides."""
    return np.full((2, 3), int(key.split("/")[1]), np.float16)


def values(ids):
    return np.stack([value(key) for key in ids])


def write(folder, ids=IDS, spec=SPEC, skip=(), stop_after=None, shard_size=4, batch=3):
    writer = FieldWriter(folder, spec, ids, shard_size=shard_size)
    for count, (shard, asked) in enumerate(writer.pending(batch)):
        if count == stop_after:
            writer.close()
            return writer
        kept = [key for key in asked if key not in skip]
        writer.put(shard, kept, values(kept))
    writer.finish()
    return writer


def read_in_child(reader, ids, queue):
    queue.put(reader.read(ids))


def test_round_trip_by_id_in_any_order(tmp_path):
    write(tmp_path)
    reader = FieldReader(tmp_path, "latents")
    asked = [IDS[i] for i in (7, 0, 9, 0)]
    assert np.array_equal(reader.read(asked), values(asked))
    assert len(reader) == 10
    assert set(reader.ids) == set(IDS)
    assert reader.spec == SPEC
    assert reader.damaged_shards() == []


@pytest.mark.parametrize("stop_after", range(4))
def test_a_writer_that_was_stopped_goes_on_and_ends_the_same(tmp_path, stop_after):
    write(tmp_path / "whole")
    write(tmp_path / "stopped", stop_after=stop_after)
    with pytest.raises(UserError, match="not finished"):
        FieldReader(tmp_path / "stopped", "latents")
    again = FieldWriter(tmp_path / "stopped", SPEC, IDS, shard_size=4)
    assert sum(len(ids) for _, ids in again.pending(3)) < 10 or stop_after == 0
    again.close()
    write(tmp_path / "stopped")
    manifests = [read_manifest(tmp_path / name, "latents") for name in ("whole", "stopped")]
    assert manifests[0]["ids_sha256"] == manifests[1]["ids_sha256"]
    assert [s["crc32"] for s in manifests[0]["shards"]] == [s["crc32"] for s in manifests[1]["shards"]]


def test_a_finished_field_has_nothing_pending(tmp_path):
    write(tmp_path)
    again = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
    assert again.complete
    assert again.pending(3) == []


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    write(tmp_path, skip={IDS[2]})
    reader = FieldReader(tmp_path, "latents")
    assert len(reader) == 9
    assert reader.manifest["num_requested"] == 10
    with pytest.raises(UserError, match=f"holds no {IDS[2]}"):
        reader.read([IDS[2]])


@pytest.mark.parametrize(
    "other",
    [
        {"spec": FieldSpec("latents", (2, 3), "float16", "test values", {"model": "other"}, SPEC.view)},
        {"ids": [*IDS[:-1], "n0/99"]},
        {"ids": IDS[::-1]},  # the order decides the shard of each id
        {"shard_size": 5},
    ],
)
def test_other_settings_are_not_mixed_into_a_folder(tmp_path, other):
    write(tmp_path, stop_after=2)
    with pytest.raises(UserError, match="was written with another"):
        write(tmp_path, **other)
    write(tmp_path)
    with pytest.raises(UserError, match="was written with another"):
        write(tmp_path, **other)


def test_two_writers_cannot_share_a_folder(tmp_path):
    first = FieldWriter(tmp_path, SPEC, IDS)
    with pytest.raises(UserError, match="another process is writing"):
        FieldWriter(tmp_path, SPEC, IDS)
    first.close()
    FieldWriter(tmp_path, SPEC, IDS).close()


def test_wrong_shape_dtype_or_nan_never_reaches_the_disk(tmp_path):
    writer = FieldWriter(tmp_path, SPEC, IDS)
    for bad in (np.zeros((1, 3, 2), np.float16), np.zeros((1, 2, 3), np.float32)):
        with pytest.raises(ValueError, match="expected"):
            writer.put(0, IDS[:1], bad)
    with pytest.raises(ValueError, match="not finite"):
        writer.put(0, IDS[:1], np.full((1, 2, 3), np.nan, np.float16))
    assert len(writer.pending(1)) == 10


def test_a_truncated_shard_is_found_before_it_is_mapped(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00001.lmdb"
    shard.write_bytes(shard.read_bytes()[:-4096])
    with pytest.raises(UserError, match=r"shard-00001.lmdb has \d+ bytes"):
        FieldReader(tmp_path, "latents")


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00001.lmdb"
    stored = value(IDS[5]).tobytes()
    shard.write_bytes(shard.read_bytes().replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))
    assert FieldReader(tmp_path, "latents").damaged_shards() == ["shard-00001.lmdb"]


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a cache"):
        FieldReader(tmp_path, "latents")
    write(tmp_path / "field")
    with pytest.raises(UserError, match="holds latents, not tokens"):
        FieldReader(tmp_path / "field", "tokens")
    manifest = json.loads((tmp_path / "field" / MANIFEST).read_text())
    (tmp_path / "field" / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="format"):
        FieldReader(tmp_path / "field", "latents")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_reader_works_in_child_processes(tmp_path, method):
    write(tmp_path)
    reader = FieldReader(tmp_path, "latents")
    reader.read(IDS[:1])  # opened here first
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(reader, IDS[4:8], queue))
    child.start()
    assert np.array_equal(queue.get(timeout=60), values(IDS[4:8]))
    child.join()
    assert child.exitcode == 0


def files_that_a_forked_child_opens(reader, queue):
    opened, lmdb_open = [], shards.lmdb.open
    shards.lmdb.open = lambda path, **options: opened.append(path) or lmdb_open(path, **options)
    reader.read(IDS[:1])
    queue.put(opened)


def test_a_forked_child_opens_its_own_environment(tmp_path):
    """LMDB forbids the use of an environment across fork, even where it seems to work."""
    write(tmp_path)
    reader = FieldReader(tmp_path, "latents")
    reader.read(IDS[:1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=files_that_a_forked_child_opens, args=(reader, queue))
    child.start()
    assert queue.get(timeout=60) == [str(tmp_path / "shard-00000.lmdb")]
    child.join()


def test_two_readers_of_one_folder_share_a_process(tmp_path):
    write(tmp_path)
    first, second = FieldReader(tmp_path, "latents"), FieldReader(tmp_path, "latents")
    assert np.array_equal(first.read(IDS[:2]), second.read(IDS[:2]))


def test_text_table_round_trip_and_damage(tmp_path):
    table = torch.randn(4, 2, 3).half()
    write_table(tmp_path, table, FieldSpec("text", (2, 3), "float16", "text"))
    read, manifest = read_table(tmp_path)
    assert read.equal(table)
    assert manifest["rows"] == 4
    file = tmp_path / "embeddings.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not the file its manifest describes"):
        read_table(tmp_path)
