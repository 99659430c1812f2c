"""The cache's format: round trips, resume, growth, several writers, damage, and readers in any process."""

import errno
import json
import multiprocessing
import os
import resource
from contextlib import suppress
from dataclasses import replace

import lmdb
import numpy as np
import pytest
import torch
from fork_server import context_of

from cache import reader as reader_module
from cache.lmdb_pages import DamagedFile, value_ranges
from cache.manifest import MANIFEST, FieldSpec, read_manifest, write_manifest
from cache.reader import FieldReader
from cache.shards import FieldWriter
from common.errors import UserError

SPEC = FieldSpec(
    "latents", (1, 2, 3), "float16", "test values", {"model": "m"}, {"kind": "aligned", "size": 8}
)
IDS = [f"n{i % 3}/{i}" for i in range(10)]


def value(key):
    """A value that only its id decides."""
    return torch.full((1, 2, 3), int(key.split("/")[1]), dtype=torch.float16)


def values(ids):
    return torch.stack([value(key) for key in ids])


def write(folder, ids=IDS, spec=SPEC, skip=(), stop_after=None, shard_size=4, batch=3, part=(0, 1)):
    writer = FieldWriter(folder, spec, ids, shard_size=shard_size, part=part)
    for count, (shard, asked) in enumerate(writer.pending(batch)):
        if count == stop_after:
            writer.close()
            return None
        kept = [key for key in asked if key not in skip]
        raw = spec.encode(values(kept)) if kept else torch.empty(0, spec.value_bytes, dtype=torch.uint8)
        writer.put(shard, kept, raw, {key: "cannot be read" for key in asked if key in skip})
    return writer.finish()


def read_in_child(reader, ids, queue):
    queue.put(reader.read(ids).numpy())


class TestRoundTrip:
    def test_by_id_in_any_order(self, tmp_path):
        write(tmp_path)
        reader = FieldReader(tmp_path, "latents")
        asked = [IDS[i] for i in (7, 0, 9, 0)]
        assert reader.read(asked).equal(values(asked))
        assert len(reader) == 10
        assert set(reader.ids) == set(IDS)
        assert reader.spec == SPEC
        assert reader.damaged_shards() == []

    @pytest.mark.parametrize(
        "shape", [(1, 2, 3), (3, 5, 97), (1, 196, 64)], ids=["inline", "odd", "pages of its own"]
    )
    def test_what_lmdb_itself_reads_is_the_bytes_of_the_value_and_no_more(self, tmp_path, shape):
        spec = FieldSpec("latents", shape, "float32", "random")
        stored = torch.randn(len(IDS), *shape)
        writer = FieldWriter(tmp_path, spec, IDS, shard_size=100)
        for shard, ids in writer.pending(4):
            writer.put(shard, ids, spec.encode(stored[[IDS.index(key) for key in ids]]))
        writer.finish()
        path = tmp_path / "shard-00000.lmdb"
        options = {"subdir": False, "readonly": True, "lock": False}
        with lmdb.open(str(path), **options) as environment, environment.begin() as transaction:
            theirs = dict(transaction.cursor())
        assert theirs == {key.encode(): row.numpy().tobytes() for key, row in zip(IDS, stored, strict=True)}
        assert FieldReader(tmp_path, "latents").read(IDS).equal(stored)
        with open(path, "rb") as file:  # our reader of LMDB's pages against LMDB
            content = path.read_bytes()
            ours = {key: content[at : at + size] for key, at, size in value_ranges(file.fileno())}
        assert ours == theirs

    def test_the_page_reader_agrees_with_lmdb_on_a_deep_tree_with_deletions(self, tmp_path):
        path, rng = str(tmp_path / "x.lmdb"), np.random.default_rng(0)
        with lmdb.open(path, subdir=False, map_size=1 << 28, lib_version=0) as environment:
            for _ in range(4):
                with environment.begin(write=True) as transaction:
                    for key in rng.integers(0, 10**6, 3000):
                        transaction.put(b"%0200d" % key, rng.bytes(int(rng.choice([0, 5, 1500, 2500, 9000]))))
                    for key, _ in zip(
                        list(transaction.cursor().iternext(values=False)), range(500), strict=False
                    ):
                        transaction.delete(key)
            with environment.begin() as transaction:
                theirs = list(transaction.cursor())
                assert transaction.stat()["depth"] >= 3
        with open(path, "rb") as file:
            ours = list(value_ranges(file.fileno()))
            assert [(key, os.pread(file.fileno(), size, at)) for key, at, size in ours] == theirs

    def test_an_empty_file_of_lmdb_holds_nothing(self, tmp_path):
        with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, lib_version=0):
            pass
        with open(tmp_path / "x.lmdb", "rb") as file:
            assert list(value_ranges(file.fileno())) == []

    def test_int8_comes_back_close_and_at_half_the_bytes(self, tmp_path):
        spec = FieldSpec("tokens", (6, 128), "int8", "tokens")
        tokens = torch.nn.functional.normalize(torch.randn(10, 6, 128), dim=-1)
        writer = FieldWriter(tmp_path, spec, IDS)
        ((shard, ids),) = writer.pending(10)
        writer.put(shard, ids, spec.encode(tokens))
        writer.finish()
        read = FieldReader(tmp_path, "tokens").read(IDS)
        assert spec.value_bytes == 6 * 128 + 6 * 2 * 2
        assert read.dtype == torch.float16
        assert (1 - torch.cosine_similarity(read.float(), tokens, dim=-1)).max() < 1e-4

    @pytest.mark.parametrize("largest", [1e-4, 1e-3, 4e-3, 8e-3, 1.0, 300.0])
    def test_int8_keeps_the_length_of_small_and_large_groups(self, largest):
        """Below 0.008 the scale is a subnormal fp16 number."""
        spec = FieldSpec("tokens", (1, 64), "int8", "tokens")
        tokens = torch.linspace(-largest, largest, 64).view(1, 1, 64)
        assert spec.decode(spec.encode(tokens)).float().norm() == pytest.approx(
            tokens.norm().item(), rel=0.03
        )

    def test_int8_keeps_small_channels_beside_an_outlier(self):
        """One scale for a whole token would round the others to zero."""
        spec = FieldSpec("tokens", (1, 128), "int8", "tokens")
        tokens = torch.full((1, 1, 128), 0.01)
        tokens[..., 100] = 3.0
        assert spec.decode(spec.encode(tokens))[..., :64].float().sub(0.01).abs().max() < 1e-4

    def test_space_over_payload_is_small(self, tmp_path):
        total = payload = 0
        for field, shape in (("latents", (4, 64, 64)), ("tokens", (196, 1024))):
            spec, ids = FieldSpec(field, shape, "float16", "zeros"), [f"n/{i}" for i in range(200)]
            writer = FieldWriter(tmp_path / field, spec, ids)
            estimate = writer.bytes_to_write
            for shard, batch in writer.pending(64):
                writer.put(shard, batch, torch.zeros(len(batch), spec.value_bytes, dtype=torch.uint8))
            (entry,) = writer.finish()["shards"]
            assert entry["bytes"] <= estimate < entry["bytes"] * 1.05  # what was asked of the disk beforehand
            total, payload = total + entry["bytes"], payload + 200 * spec.value_bytes
        assert total / payload < 1.03


class TestCold:
    """Values that are not in memory, or in part, are asked of the disk."""

    @pytest.mark.parametrize("in_memory", [0, 7, 12])
    def test_what_memory_lacks_comes_from_the_disk(self, tmp_path, monkeypatch, in_memory):
        write(tmp_path)

        def part(file, buffer, offset):
            buffer[:in_memory] = np.frombuffer(os.pread(file, in_memory, offset), np.uint8)
            return in_memory

        asked = []
        monkeypatch.setattr(reader_module, "_read_from_memory", part)
        monkeypatch.setattr(reader_module, "will_need", lambda *of: asked.append(of))
        assert FieldReader(tmp_path, "latents").read(IDS[2:9]).equal(values(IDS[2:9]))
        assert len(asked) == (0 if in_memory == 12 else 7)
        assert all(size == 12 - in_memory for _, _, size in asked)

    def test_a_dropped_page_cache_changes_nothing(self, tmp_path):
        write(tmp_path)
        for path in tmp_path.glob("*.lmdb"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert FieldReader(tmp_path, "latents").read(IDS[::-1]).equal(values(IDS[::-1]))

    def test_a_system_without_such_calls_reads_too(self, tmp_path, monkeypatch):
        write(tmp_path)
        monkeypatch.delattr(os, "RWF_NOWAIT")
        monkeypatch.delattr(os, "posix_fadvise")
        assert FieldReader(tmp_path, "latents").read(IDS).equal(values(IDS))

    @pytest.mark.parametrize(
        ("code", "raised"), [(errno.EOPNOTSUPP, False), (errno.EAGAIN, False), (errno.EIO, True)]
    )
    def test_a_file_system_that_cannot_say_is_asked_the_ordinary_way(
        self, tmp_path, monkeypatch, code, raised
    ):
        write(tmp_path)
        preadv = os.preadv

        def refuse(file, buffers, offset, flags=0):
            if flags:
                raise OSError(code, "")
            return preadv(file, buffers, offset)

        monkeypatch.setattr(os, "preadv", refuse)
        reader = FieldReader(tmp_path, "latents")
        if raised:
            with pytest.raises(OSError, match=str(code)):
                reader.read(IDS)
        else:
            assert reader.read(IDS).equal(values(IDS))


class TestResume:
    def test_two_fields_may_be_written_in_any_order_of_batches(self, tmp_path):
        """Going back to a shard that was left half full must not have sealed it."""
        whole = write(tmp_path / "whole")
        writer = FieldWriter(tmp_path / "mixed", SPEC, IDS, shard_size=4)
        for shard, batch in sorted(writer.pending(2), key=lambda item: item[1][-1]):
            writer.put(shard, batch, SPEC.encode(values(batch)))
        assert [entry["checksum"] for entry in writer.finish()["shards"]] == [
            entry["checksum"] for entry in whole["shards"]
        ]

    @pytest.mark.parametrize("mended", [True, False], ids=["mended", "damaged"])
    def test_an_image_that_changed_between_two_runs_does_no_harm(self, tmp_path, mended):
        """Killed between noting an unreadable image and storing the rest, or run again with other batches."""
        bad = {IDS[1]: "cannot be read"}
        writer = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
        (shard, batch) = writer.pending(4)[0]
        kept = batch if not mended else [key for key in batch if key not in bad]
        writer.put(shard, kept[:2], SPEC.encode(values(kept[:2])), bad if mended else {})
        writer.close()
        manifest = write(tmp_path, skip=() if mended else set(bad), batch=4)
        assert manifest["num_samples"] == 10  # what was stored, or could be read in the end, counts
        assert not (tmp_path / "unreadable.csv").exists()
        assert FieldReader(tmp_path, "latents").read(IDS).equal(values(IDS))

    def test_a_mended_image_of_a_deleted_shard_is_no_longer_unreadable(self, tmp_path):
        write(tmp_path, skip={IDS[5]})
        assert (tmp_path / "unreadable.csv").exists()
        (tmp_path / "shard-00001.lmdb").unlink()
        assert write(tmp_path)["num_unreadable"] == 0
        assert FieldReader(tmp_path, "latents").unreadable == []

    def test_a_list_that_grew_while_a_part_was_running_is_not_forgotten(self, tmp_path):
        first = FieldWriter(tmp_path, SPEC, IDS[:4], shard_size=4, part=(0, 2))
        pending = first.pending(4)
        assert write(tmp_path, ids=IDS[:8], part=(1, 2)) is None
        for shard, batch in pending:
            first.put(shard, batch, SPEC.encode(values(batch)))
        assert first.finish()["num_samples"] == 8

    def test_a_partial_shard_cut_short_in_its_first_pages_is_begun_anew(self, tmp_path):
        """What a disk that is full at that moment leaves behind."""
        writer = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
        (tmp_path / "shard-00000.lmdb.partial").write_bytes(bytes(4096))
        assert len(writer.pending(4)) == 3
        writer.close()
        assert write(tmp_path)["num_samples"] == 10

    def test_a_foreign_partial_shard_is_one_line(self, tmp_path):
        FieldWriter(tmp_path, SPEC, IDS, shard_size=4).close()
        (tmp_path / "shard-00001.lmdb.partial").write_bytes(b"x" * 100_000)
        with pytest.raises(UserError, match=r"shard-00001.lmdb.partial is damaged .*: delete"):
            write(tmp_path)

    @pytest.mark.parametrize("stop_after", range(4))
    def test_a_writer_that_was_stopped_goes_on_and_ends_the_same(self, tmp_path, stop_after):
        whole = write(tmp_path / "whole")
        assert write(tmp_path / "stopped", stop_after=stop_after) is None
        with pytest.raises(UserError, match="not finished"):
            FieldReader(tmp_path / "stopped", "latents")
        again = FieldWriter(tmp_path / "stopped", SPEC, IDS, shard_size=4)
        assert [batch for _, batch in again.pending(3)] == [
            batch for batch in (IDS[:3], IDS[3:4], IDS[4:7], IDS[7:8], IDS[8:])[stop_after:]
        ]
        again.close()
        assert write(tmp_path / "stopped")["shards"] == whole["shards"]
        assert FieldReader(tmp_path / "stopped", "latents").damaged_shards() == []

    def test_a_finished_field_has_nothing_pending(self, tmp_path):
        write(tmp_path)
        again = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
        assert again.complete
        assert again.pending(3) == []

    def test_unreadable_images_are_left_out_counted_and_not_tried_again(self, tmp_path):
        write(tmp_path, skip={IDS[2]}, stop_after=1)
        again = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
        assert IDS[2] not in [key for _, batch in again.pending(3) for key in batch]
        again.close()
        write(tmp_path, skip={IDS[2], IDS[9]})
        reader = FieldReader(tmp_path, "latents")
        assert len(reader) == 8
        assert reader.manifest["num_unreadable"] == 2
        assert reader.unreadable == [IDS[2], IDS[9]]
        with pytest.raises(UserError, match=f"holds no {IDS[2]}"):
            reader.read([IDS[2]])

    def test_a_shard_of_nothing_but_unreadable_images_is_empty(self, tmp_path):
        assert [shard["count"] for shard in write(tmp_path, skip=set(IDS[:4]))["shards"]] == [0, 4, 2]
        assert FieldReader(tmp_path, "latents").read(IDS[4:]).equal(values(IDS[4:]))

    @pytest.mark.parametrize(
        "other",
        [
            {
                "spec": FieldSpec(
                    "latents", (1, 2, 3), "float16", "test values", {"model": "other"}, SPEC.view
                )
            },
            {"spec": FieldSpec("latents", (1, 2, 3), "bfloat16", "test values", SPEC.source, SPEC.view)},
        ],
    )
    def test_other_settings_are_not_mixed_into_a_folder(self, tmp_path, other):
        write(tmp_path, stop_after=2)
        with pytest.raises(UserError, match="was written with another"):
            write(tmp_path, **other)
        write(tmp_path)
        with pytest.raises(UserError, match="was written with another"):
            write(tmp_path, **other)

    def test_the_size_of_shards_is_the_folders_own(self, tmp_path):
        write(tmp_path, stop_after=2)
        with pytest.raises(UserError, match="has shards of 4 images: leave --shard-size out"):
            write(tmp_path, shard_size=5)
        assert len(write(tmp_path, shard_size=None)["shards"]) == 3

    def test_a_writer_finds_a_truncated_shard_too(self, tmp_path):
        write(tmp_path)
        (tmp_path / "shard-00001.lmdb").write_bytes(b"short")
        with pytest.raises(UserError, match="delete that file and run the same command"):
            write(tmp_path)

    @pytest.mark.parametrize("finished", [True, False])
    def test_a_list_of_other_images_is_not_mixed_into_a_folder(self, tmp_path, finished):
        write(tmp_path, stop_after=None if finished else 2)
        for other in ([*IDS[:-1], "n0/99"], ["n0/99"]):
            with pytest.raises(UserError, match="was begun for other images too"):
                write(tmp_path, ids=other)
        if not finished:  # what is missing could not be made from a shorter list
            with pytest.raises(UserError, match="was begun for other images too"):
                write(tmp_path, ids=IDS[:6])
        write(tmp_path)
        assert FieldWriter(tmp_path, SPEC, IDS[:6], shard_size=4).complete

    def test_a_deleted_shard_is_made_anew_and_no_other(self, tmp_path):
        before = write(tmp_path)
        (tmp_path / "shard-00001.lmdb").unlink()
        with pytest.raises(UserError, match="only this shard is made anew"):
            FieldReader(tmp_path, "latents")
        kept = (tmp_path / "shard-00000.lmdb").stat().st_mtime_ns
        assert write(tmp_path) == before
        assert (tmp_path / "shard-00000.lmdb").stat().st_mtime_ns == kept
        assert FieldReader(tmp_path, "latents").read(IDS).equal(values(IDS))

    def test_a_manifest_of_shards_before_they_were_made_anew_is_written_anew(self, tmp_path, monkeypatch):
        """Killed after the last shard was sealed again, before the manifest."""
        write(tmp_path)
        (tmp_path / "shard-00001.lmdb").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(FieldWriter, "_write_manifest", lambda self: 1 / 0)
            writer = FieldWriter(tmp_path, SPEC, IDS, shard_size=4)
            ((shard, first), (_, last)) = writer.pending(3)
            for batch in (first, last):  # other values than before, as another device might make
                writer.put(shard, batch, SPEC.encode(values(batch) + 1))
            with pytest.raises(ZeroDivisionError):
                writer.finish()
            writer.close()
        assert not FieldWriter(tmp_path, SPEC, IDS, shard_size=4).complete
        write(tmp_path)
        assert FieldReader(tmp_path, "latents").damaged_shards() == []


MORE = [*IDS, *(f"n9/{i}" for i in range(20, 27))]


class TestGrowth:
    def test_adding_images_appends_shards_and_rewrites_none(self, tmp_path):
        first = write(tmp_path)
        stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.lmdb")}
        grown = write(tmp_path, ids=MORE)
        assert grown["shards"][:3] == first["shards"]
        assert [shard["count"] for shard in grown["shards"]] == [4, 4, 2, 4, 3]
        assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
        assert FieldReader(tmp_path, "latents").read(MORE).equal(values(MORE))

    def test_while_it_grows_the_finished_part_can_be_read(self, tmp_path):
        write(tmp_path)
        write(tmp_path, ids=MORE, stop_after=1)
        assert FieldReader(tmp_path, "latents").read(IDS).equal(values(IDS))
        assert not FieldWriter(tmp_path, SPEC, MORE, shard_size=4).complete
        assert write(tmp_path, ids=MORE)["num_samples"] == 17

    def test_the_order_of_a_list_does_not_matter_once_it_is_planned(self, tmp_path):
        write(tmp_path / "a", stop_after=1)
        assert write(tmp_path / "a", ids=IDS[::-1])["shards"] == write(tmp_path / "b")["shards"]


def try_to_write(folder, part, queue):
    try:
        writer = FieldWriter(folder, SPEC, IDS, shard_size=4, part=part)
        writer.pending(3)
        queue.put("free")
    except UserError as error:
        queue.put(str(error))


class TestSeveralWriters:
    def test_each_owns_whole_shards_and_the_last_one_writes_the_manifest(self, tmp_path):
        alone = write(tmp_path / "alone")
        assert write(tmp_path / "both", part=(1, 2)) is None
        assert not (tmp_path / "both" / MANIFEST).exists()
        assert write(tmp_path / "both", part=(0, 2))["shards"] == alone["shards"]
        assert write(tmp_path / "both", part=(1, 2))["shards"] == alone["shards"]  # has nothing left to do

    def test_parts_are_disjoint_and_cover_all(self, tmp_path):
        owned = [FieldWriter(tmp_path, SPEC, IDS, shard_size=4, part=(i, 2)).mine for i in range(2)]
        assert sorted(owned[0] + owned[1]) == [0, 1, 2]

    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    def test_two_writers_cannot_share_a_shard(self, tmp_path, method):
        context = context_of(method)
        first, said = FieldWriter(tmp_path, SPEC, IDS, shard_size=4, part=(0, 2)), context.Queue()
        first.pending(3)
        for part, expected in (((0, 1), "another process is writing"), ((1, 2), "free")):
            other = context.Process(target=try_to_write, args=(tmp_path, part, said))
            other.start()
            assert expected in said.get(timeout=60)
            other.join()
        first.close()


class TestRefusals:
    def test_wrong_shape_or_values_never_reach_the_disk(self, tmp_path):
        writer = FieldWriter(tmp_path, SPEC, IDS)
        with pytest.raises(ValueError, match="expected"):
            writer.put(0, IDS[:1], torch.zeros(1, 10, dtype=torch.uint8))
        with pytest.raises(ValueError, match="expected"):
            SPEC.encode(torch.zeros(1, 1, 3, 2))
        for bad in (float("nan"), float("-inf"), 70000.0):  # 70000 is beyond fp16
            one_bad = torch.zeros(1, 1, 2, 3)
            one_bad[0, 0, 1, 1] = bad
            with pytest.raises(UserError, match=r"not finite numbers as \(1, 2, 3\) float16"):
                writer.put(0, IDS[:1], SPEC.encode(one_bad))
        assert len(writer.pending(1)) == 10

    def test_nan_in_int8_is_found(self, tmp_path):
        spec = FieldSpec("tokens", (1, 64), "int8", "tokens")
        writer = FieldWriter(tmp_path, spec, IDS)
        with pytest.raises(UserError, match="not finite"):
            writer.put(0, IDS[:1], spec.encode(torch.full((1, 1, 64), float("nan"))))

    def test_a_shard_is_not_sealed_before_it_is_whole(self, tmp_path):
        writer = FieldWriter(tmp_path, SPEC, IDS)
        writer.put(0, IDS[:3], SPEC.encode(values(IDS[:3])))
        with pytest.raises(ValueError, match="sealed too early"):
            writer.finish()

    def test_a_truncated_shard_is_found_by_its_size(self, tmp_path):
        write(tmp_path)
        shard = tmp_path / "shard-00001.lmdb"
        shard.write_bytes(shard.read_bytes()[:-4096])
        with pytest.raises(UserError, match=r"shard-00001.lmdb has \d+ bytes"):
            FieldReader(tmp_path, "latents")

    def test_a_flipped_byte_is_found_by_its_checksum(self, tmp_path):
        write(tmp_path)
        shard = tmp_path / "shard-00001.lmdb"
        stored = value(IDS[5]).numpy().tobytes()
        shard.write_bytes(shard.read_bytes().replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))
        assert FieldReader(tmp_path, "latents").damaged_shards() == ["shard-00001.lmdb"]

    def test_swapped_values_are_found_by_the_checksum(self, tmp_path):
        write(tmp_path)
        shard = tmp_path / "shard-00000.lmdb"
        a, b = (value(IDS[i]).numpy().tobytes() for i in (1, 2))
        content = shard.read_bytes().replace(a, b"\0" * 12 + b"?").replace(b, a).replace(b"\0" * 12 + b"?", b)
        shard.write_bytes(content[: len(shard.read_bytes())])
        assert FieldReader(tmp_path, "latents").damaged_shards() == ["shard-00000.lmdb"]

    @pytest.mark.parametrize("seed", range(8))
    def test_damage_anywhere_is_found_or_harmless_and_never_ends_the_process(self, tmp_path, seed):
        """Random bytes over b-tree pages make LMDB itself read outside of its map."""
        ids = [f"n/{i}" for i in range(300)]
        write(tmp_path, ids=ids, shard_size=300, batch=100)
        shard, rng = tmp_path / "shard-00000.lmdb", np.random.default_rng(seed)
        content = bytearray(shard.read_bytes())
        for at in rng.integers(0, len(content) - 8, 40):
            content[at : at + 8] = rng.bytes(8)
        shard.write_bytes(content)
        with suppress(UserError):  # said what is wrong
            reader = FieldReader(tmp_path, "latents")
            assert reader.read(ids).equal(values(ids)) or reader.damaged_shards()

    @pytest.mark.parametrize("content", ["zeros", "text", "another cache"])
    def test_a_foreign_file_of_the_right_size_is_refused(self, tmp_path, content):
        write(tmp_path / "field")
        shard = tmp_path / "field" / "shard-00000.lmdb"
        size = shard.stat().st_size
        if content == "another cache":
            write(tmp_path / "other", ids=[key.replace("n", "m") for key in IDS])
            data = (tmp_path / "other" / "shard-00000.lmdb").read_bytes()
        else:
            data = {"zeros": b"\0", "text": b"x"}[content] * size
        assert len(data) == size
        shard.write_bytes(data)
        with pytest.raises(UserError, match="run the script that wrote it again"):
            FieldReader(tmp_path / "field", "latents").read(IDS)

    def test_values_of_another_size_are_refused(self, tmp_path):
        write(tmp_path)
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"dtype": "float32"}))
        with pytest.raises(UserError, match="was edited by hand"):
            FieldReader(tmp_path, "latents")
        manifest.pop("seal")
        write_manifest(tmp_path, manifest | {"dtype": "float32"})
        with pytest.raises(UserError, match=r"not this folder's own \(another dtype"):
            FieldReader(tmp_path, "latents")
        (tmp_path / "settings.json").unlink()  # not needed to read
        with pytest.raises(UserError, match="not of 24 bytes"):
            FieldReader(tmp_path, "latents").read(IDS)

    def test_a_cycle_of_pages_ends(self, tmp_path):
        """A branch page that is its own child."""
        path = tmp_path / "x.lmdb"
        options = {"subdir": False, "map_size": 1 << 26, "lib_version": 0}
        with lmdb.open(str(path), **options) as environment, environment.begin(write=True) as transaction:
            for i in range(2000):
                transaction.put(b"%0100d" % i, b"")
        content = bytearray(path.read_bytes())
        transactions = [int.from_bytes(content[p * 4096 + 144 :][:8], "little") for p in (0, 1)]
        root = int.from_bytes(content[transactions.index(max(transactions)) * 4096 + 128 :][:8], "little")
        page = root * 4096
        for at in range(page + 16, page + int.from_bytes(content[page + 12 : page + 14], "little"), 2):
            node = page + int.from_bytes(content[at : at + 2], "little")
            content[node : node + 6] = root.to_bytes(6, "little")
        path.write_bytes(content)
        with open(path, "rb") as file, pytest.raises(DamagedFile):
            list(value_ranges(file.fileno()))

    def test_foreign_folders_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="is not a cache"):
            FieldReader(tmp_path, "latents")
        write(tmp_path / "field")
        with pytest.raises(UserError, match="holds latents, not tokens"):
            FieldReader(tmp_path / "field", "tokens")
        manifest = json.loads((tmp_path / "field" / MANIFEST).read_text())
        for change, message in (
            ({"shape": 5}, "shape"),
            ({"shards": 5}, "shards"),
            ({"shards": [{"file": "x"}]}, r"shards\.0\.file"),
            ({"dtype": []}, "dtype"),
            ({"version": 99}, "version"),
            ({"dtype": "float7"}, "dtype"),
            ({"shards": None}, "shards' is missing"),
        ):
            changed = {key: value for key, value in (manifest | change).items() if value is not None}
            (tmp_path / "field" / MANIFEST).write_text(json.dumps(changed))
            with pytest.raises(UserError, match=message):
                FieldReader(tmp_path / "field", "latents")

    @pytest.mark.parametrize("file", ["settings.json", "plan.json", "manifest.json", "shard-00001.json"])
    @pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"shards": 5}', '{"shards": null}'])
    def test_damaged_notes_of_a_folder_are_one_line(self, tmp_path, file, content):
        write(tmp_path)
        (tmp_path / file).write_text(content)
        try:
            write(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 (or it was made anew)
        else:
            assert FieldReader(tmp_path, "latents").read(IDS).equal(values(IDS))

    def test_a_folder_without_its_settings_is_not_written_to(self, tmp_path):
        write(tmp_path)
        (tmp_path / "settings.json").unlink()
        (tmp_path / "shard-00001.lmdb").unlink()
        with pytest.raises(UserError, match="has lost its settings"):
            write(tmp_path)

    def test_too_long_an_id_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="longer than 511 bytes"):
            FieldWriter(tmp_path, SPEC, ["x" * 600])

    def test_a_read_only_folder_is_one_line(self, tmp_path):
        (tmp_path / "field").write_text("a file where the folder should be")
        with pytest.raises(UserError, match="cannot write to"):
            FieldWriter(tmp_path / "field", SPEC, IDS)


def fill_the_disk(folder, queue):
    """Files of this process may not grow beyond 3 MB, which LMDB meets as it meets a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))
    queue.put(write_large(folder))


def write_large(folder):
    spec = FieldSpec("tokens", (512, 100), "float16", "large")  # 100 kB
    ids = [f"n/{i}" for i in range(60)]
    try:
        writer = FieldWriter(folder, spec, ids)
        for shard, batch in writer.pending(8):
            numbers = torch.tensor([int(key.split("/")[1]) for key in batch])
            writer.put(shard, batch, spec.encode(numbers[:, None, None].expand(-1, *spec.shape)))
        return writer.finish()["shards"]
    except UserError as error:
        return str(error)


def test_a_full_disk_is_one_line_and_what_was_durable_stays(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=fill_the_disk, args=(tmp_path / "a", queue))
    child.start()
    said = queue.get(timeout=60)
    child.join()
    assert said.startswith("cannot write to")
    assert "run the same command" in said
    spec = FieldSpec("tokens", (512, 100), "float16", "large")
    again = FieldWriter(tmp_path / "a", spec, [f"n/{i}" for i in range(60)])
    assert 0 < len(again.pending(8)) < 8
    again.close()
    assert write_large(tmp_path / "a") == write_large(tmp_path / "b")


class TestProcesses:
    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    def test_an_open_reader_works_in_child_processes(self, tmp_path, method):
        write(tmp_path)
        reader = FieldReader(tmp_path, "latents")
        reader.read(IDS[:1])  # opened here first
        context = context_of(method)
        queue = context.Queue()
        child = context.Process(target=read_in_child, args=(reader, IDS[4:8], queue))
        child.start()
        assert np.array_equal(queue.get(timeout=60), values(IDS[4:8]).numpy())
        child.join()
        assert child.exitcode == 0

    def test_two_readers_of_one_folder_share_a_process(self, tmp_path):
        write(tmp_path)
        first, second = FieldReader(tmp_path, "latents"), FieldReader(tmp_path, "latents")
        assert first.read(IDS[:2]).equal(second.read(IDS[:2]))

    def test_reading_leaves_nothing_behind_in_the_folder(self, tmp_path):
        """So it works on read-only file systems; LMDB would have made lock files."""
        write(tmp_path)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        FieldReader(tmp_path, "latents").read(IDS)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_samples": 9}, "num_samples"),
        ({"shape": [4, 8]}, "shape"),
        ({"shards": [{"file": "../shard-00000.lmdb", "count": 10, "bytes": 1, "checksum": 1}]}, "file"),
        ({"field": "tokens", "shape": [5, 8], "view": {"grid": 2}}, "grid"),
        ({"meaning": "another"}, "meaning"),
    ],
)
def test_a_manifest_that_was_sealed_again_must_still_agree_with_itself_and_the_settings(
    tmp_path, change, says
):
    write(tmp_path)
    changed = read_manifest(tmp_path, "latents") | change
    write_manifest(tmp_path, changed)
    with pytest.raises(UserError, match=says) as error:
        read_manifest(tmp_path, changed["field"])
    assert "run the script that wrote it again" in str(error.value)


class TestPartialShards:
    """What is not this cache's own is never sealed, and nothing maps a file that is cut off."""

    def begun(self, folder, **more):
        write(folder, stop_after=1, batch=2, **more)
        return folder / "shard-00000.lmdb.partial"

    @pytest.mark.parametrize("pages", range(2, 8))
    def test_a_truncated_one_is_one_line_or_goes_on_to_the_same_end(self, tmp_path, pages):
        spec = FieldSpec("latents", (4, 32, 32), "float16", "zeros")
        writer = FieldWriter(tmp_path, spec, IDS)
        ((shard, ids),) = writer.pending(10)
        writer.put(shard, ids[:8], torch.zeros(8, spec.value_bytes, dtype=torch.uint8))
        writer.close()
        os.truncate(tmp_path / "shard-00000.lmdb.partial", pages * 4096)
        with pytest.raises(UserError, match=r"shard-00000\.lmdb\.partial is damaged .*: delete"):
            FieldWriter(tmp_path, spec, IDS).pending(10)

    @pytest.mark.parametrize("what", ["ids", "size", "settings", "unknown"])
    def test_one_of_another_cache_is_refused(self, tmp_path, what):
        other = {
            "ids": {"ids": [f"m/{i}" for i in range(10)]},
            "size": {"spec": replace(SPEC, dtype="float32")},
            "settings": {"spec": replace(SPEC, source={"model": "other"})},
            "unknown": {},
        }[what]
        theirs, ours = self.begun(tmp_path / "theirs", **other), self.begun(tmp_path / "ours")
        os.replace(theirs, ours)
        notes = [path.with_name("shard-00000.begun") for path in (theirs, ours)]
        if what == "settings":
            os.replace(*notes)
        elif what == "unknown":
            notes[1].unlink()
        with pytest.raises(UserError, match=r"partial was begun for another cache: delete"):
            write(tmp_path / "ours")
        ours.unlink()
        assert write(tmp_path / "ours")["num_samples"] == 10

    def test_a_sealed_shard_has_no_notes(self, tmp_path):
        self.begun(tmp_path)
        assert (tmp_path / "shard-00000.begun").exists()
        write(tmp_path)
        assert not list(tmp_path.glob("*.begun"))


def test_a_manifest_counts_what_is_stored(tmp_path):
    write(tmp_path, skip={IDS[0]})
    manifest = read_manifest(tmp_path, "latents")
    assert manifest["num_samples"] == sum(shard["count"] for shard in manifest["shards"]) == 9
