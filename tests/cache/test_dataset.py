"""The dataset, the order of reading, and the stream of batches that training uses."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from fork_server import context_of

from cache.batch_stream import BatchStream
from cache.dataset import AlignedDataset, latents_of
from cache.image_list import Sample, read_samples, write_samples
from cache.manifest import FieldSpec, TextSpec
from cache.order import StepSampler
from cache.reader import FieldReader
from cache.shards import FieldWriter
from cache.text import TextReader, write_text
from common.errors import UserError

CPU = torch.device("cpu")
PATHS = ("train.csv", "cache/latents", "cache/tokens", "cache/text")


def open_dataset(root, **more):
    return AlignedDataset(*(root / path for path in PATHS), **more)


def stream_of(dataset, batches, **more):
    return BatchStream(batches, dataset.read_batch, dataset.value_bytes, dataset.decode, **more)


def write_field(folder, spec, ids, values, shard_size=4):
    writer = FieldWriter(folder, spec, ids, shard_size=shard_size)
    for shard, batch in writer.pending(3):
        writer.put(shard, batch, spec.encode(torch.stack([values[key] for key in batch])))
    writer.finish()


def write_cache(root, *, latent_ids, token_ids, posterior="mode", scaled=True):
    """A cache of random values whose fields hold the given ids in the given orders; returns the values."""
    channels = 8 if posterior == "moments" else 4
    details = {"posterior": posterior, "scaled": scaled, "scaling_factor": 0.5}
    values = {}
    for name, field, shape, ids in (
        ("latent", "latents", (channels, 2, 2), latent_ids),
        ("dino_tokens", "tokens", (4, 64), token_ids),
    ):
        values[name] = {key: torch.randn(shape).half() for key in ids}
        more = {"details": details} if field == "latents" else {}
        write_field(
            root / "cache" / field, FieldSpec(field, shape, "float16", "x", **more), ids, values[name]
        )
    text, named = torch.randn(4, 5, 8), {"prompt_embeds": {"shape": [5, 8], "dtype": "float32"}}
    listed = {"n_classes": 3, "synsets": [], "prompts": ["a", "b", "c"]}
    write_text(
        root / "cache" / "text", TextSpec.of(named, "x", {}, {}), listed,
        {"prompt_embeds": text[:-1]}, {"prompt_embeds": text[-1]},
    )  # fmt: skip
    listed = sorted(set(latent_ids) | set(token_ids))
    write_samples(root / "train.csv", [Sample(key, "unused", i % 3, "n") for i, key in enumerate(listed)])
    return values


class TestItems:
    def test_they_are_the_contract(self, miniature):
        dataset = open_dataset(miniature)
        item = dataset[5]
        assert set(item) == {"latent", "dino_tokens", "prompt_embeds", "class_id"}
        assert item["latent"].shape == (4, 16, 16)
        assert item["dino_tokens"].shape == (16, 64)
        assert item["prompt_embeds"].equal(
            dataset.text.fields_of([int(item["class_id"])])["prompt_embeds"][0]
        )
        assert len(dataset.text) == 10
        stored = TextReader(miniature / "cache" / "text")
        assert stored.null["prompt_embeds"].shape == (77, 32)
        assert dataset.text.null["prompt_embeds"].equal(stored.null["prompt_embeds"])
        class_of = {sample.id: sample.class_id for sample in read_samples(miniature / "train.csv")}
        chosen = [7, 2, 11]
        for index, item in zip(chosen, dataset.__getitems__(chosen), strict=True):  # in the order asked for
            key = dataset.ids[index]
            assert item["latent"].equal(dataset.latents.read([key])[0].float())
            assert item["dino_tokens"].equal(dataset.tokens.read([key])[0])
            assert item["class_id"] == class_of[key]
        assert "dino_tokens" not in open_dataset(miniature, need_tokens=False)[5]

    def test_fields_are_joined_by_id_whatever_their_order(self, tmp_path):
        ids = [f"n/{i}" for i in range(11)]
        values = write_cache(tmp_path, latent_ids=ids, token_ids=ids[::-1])
        dataset = open_dataset(tmp_path)
        assert len(dataset) == 11
        for i, key in enumerate(dataset.ids):
            assert dataset[i]["latent"].equal(values["latent"][key].float())
            assert dataset[i]["dino_tokens"].equal(values["dino_tokens"][key])

    def test_an_image_that_one_field_lacks_is_left_out_and_counted(self, tmp_path):
        ids = [f"n/{i}" for i in range(11)]
        write_cache(tmp_path, latent_ids=ids[:9], token_ids=ids[2:])
        dataset = open_dataset(tmp_path)
        assert set(dataset.ids) == set(ids[2:9])
        assert dataset.left_out == 4

    @pytest.mark.parametrize(
        "row", [",unused,0,n", '"a\nb",unused,0,n', "a,unused,-1,n", f"a,unused,{10**30},n", "a" * 200_000]
    )
    def test_an_odd_row_of_the_list_is_one_line(self, tmp_path, row):
        (tmp_path / "list.csv").write_text(f"id,img_path,class_id,synset\n{row}\n")
        with pytest.raises(UserError) as error:
            read_samples(tmp_path / "list.csv")
        assert "\n" not in str(error.value)

    def test_two_fields_without_a_common_image_are_one_line(self, tmp_path):
        write_cache(tmp_path, latent_ids=["a", "b"], token_ids=["c", "d"])
        with pytest.raises(UserError, match="none of the images"):
            open_dataset(tmp_path)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_unscaled_latents_are_scaled_when_read(self, tmp_path, scaled):
        values = write_cache(tmp_path, latent_ids=["a"], token_ids=["a"], scaled=scaled)
        expected = values["latent"]["a"].float() * (1.0 if scaled else 0.5)
        assert open_dataset(tmp_path)[0]["latent"].equal(expected)

    def test_moments_give_their_mean_and_to_training_a_draw(self, tmp_path):
        values = write_cache(tmp_path, latent_ids=["a"], token_ids=["a"], posterior="moments")
        dataset = open_dataset(tmp_path)
        mean, std = values["latent"]["a"].float().chunk(2)
        assert dataset.latent_shape[0] == 4
        assert dataset[0]["latent"].equal(mean)
        stored = torch.cat([torch.full((1, 4, 50, 50), 3.0), torch.full((1, 4, 50, 50), 0.25)], dim=1)
        details = dataset.latents.spec.details
        drawn = [latents_of(stored, details, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert drawn[0].equal(drawn[1])
        assert not drawn[0].equal(drawn[2])
        assert abs(drawn[0].mean() - 3) < 0.02
        assert abs(drawn[0].std() - 0.25) < 0.02
        assert std.shape == mean.shape

    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    def test_any_dataloader_can_use_it(self, miniature, method):
        dataset = open_dataset(miniature)
        here = dataset.__getitems__([3, 1])  # the files are open when workers start
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=[[3, 1], [2, 5]], num_workers=2, multiprocessing_context=context_of(method)
        )
        there = next(iter(loader))
        for name in ("latent", "dino_tokens", "prompt_embeds", "class_id"):
            assert there[name].equal(torch.stack([item[name] for item in here])), name


class TestOrder:
    def batches(self, first, last, seed=0, ranks=(0, 1), size=3):
        return list(
            StepSampler(10, batch_size=size, seed=seed, first_step=first, last_step=last, ranks=ranks)
        )

    def test_it_is_a_pure_function_of_the_step(self):
        whole = self.batches(0, 9)
        assert self.batches(4, 9) == whole[4:]
        for epoch in (whole[0:3], whole[3:6], whole[6:9]):
            assert len({index for batch in epoch for index in batch}) == 9  # none twice in an epoch
        assert whole[0:3] != whole[3:6]
        assert self.batches(0, 9, seed=1) != whole

    def test_ranks_read_disjoint_images_and_together_what_one_would(self):
        ranks = [self.batches(0, 4, ranks=(r, 2), size=2) for r in range(2)]
        together = [a + b for a, b in zip(*ranks, strict=True)]
        assert together == self.batches(0, 4, size=4)
        for step in range(0, 4, 2):  # an epoch is two steps
            seen = [index for batch in together[step : step + 2] for index in batch]
            assert len(seen) == len(set(seen)) == 8
        assert self.batches(3, 4, ranks=(1, 2), size=2) == ranks[1][3:]

    def test_too_few_images_for_a_step_are_one_line(self):
        with pytest.raises(UserError, match="on 4 process"):
            self.batches(0, 1, ranks=(0, 4))


class TestStream:
    @pytest.mark.parametrize("threads", [0, 1, 4])
    def test_it_brings_what_the_dataset_holds_in_order(self, miniature, threads):
        dataset = open_dataset(miniature)
        batches = list(StepSampler(len(dataset), batch_size=7, seed=3, first_step=0, last_step=30))
        stream = stream_of(dataset, batches, threads=threads)
        for asked, batch in zip(batches, stream, strict=True):
            assert batch.indices == asked
            for name, reader in dataset.readers.items():
                expected = reader.read([dataset.ids[index] for index in asked])
                assert batch.on(CPU, name).equal(expected)

    def test_its_memory_is_used_again(self, miniature):
        dataset = open_dataset(miniature)
        seen = {
            batch.raw["dino_tokens"].data_ptr()
            for batch in stream_of(dataset, [[0, 1]] * 40, threads=2, ahead=3)
        }
        assert len(seen) <= 5

    def test_a_batch_is_not_overwritten_while_it_is_in_use(self, miniature):
        dataset = open_dataset(miniature)
        batches = [[i, i + 1] for i in range(40)]
        for batch in stream_of(dataset, batches, threads=3):
            before = batch.on(CPU, "latent").clone()
            time.sleep(0.005)  # readers run ahead meanwhile
            assert batch.on(CPU, "latent").equal(before)

    def test_no_two_batches_share_memory_while_one_is_read_or_used(self):
        lock, busy, shared = threading.Lock(), set(), []

        def read(indices, raw):
            where = raw["x"].data_ptr()
            with lock:
                shared.extend([indices] if where in busy else [])
                busy.add(where)
            time.sleep(0.002)

        for batch in BatchStream([[i] for i in range(40)], read, {"x": 64}, {}, threads=3, ahead=4):
            time.sleep(0.001)
            with lock:
                busy.discard(batch.raw["x"].data_ptr())
        assert not shared

    def test_readers_run_ahead_but_not_away(self):
        read = []
        stream = BatchStream(
            [[i] for i in range(50)], lambda indices, raw: read.append(indices[0]), {}, {}, threads=1, ahead=2
        )
        batches = iter(stream)
        next(batches)
        deadline = time.monotonic() + 5
        while len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert read == [0, 1, 2]
        batches.close()

    def test_waiting_for_the_gpu_to_take_earlier_batches_is_no_lack_of_data(self):
        class Taken:
            """An event of a copy that the GPU has not come to yet."""

            @staticmethod
            def synchronize():
                time.sleep(0.05)

        class Slow(BatchStream):
            def _slot(self, count):
                slot = super()._slot(count)
                slot.copied = [Taken]
                return slot

        batches, size = [[i] for i in range(6)], {"x": 8}
        behind = Slow(batches, lambda indices, raw: None, size, {}, threads=1, ahead=1)
        assert len(list(behind)) == 6
        assert behind.waited < 0.05
        slow = BatchStream(batches, lambda indices, raw: time.sleep(0.05), size, {}, threads=1, ahead=1)
        assert len(list(slow)) == 6
        assert slow.waited > 0.15

    def test_a_failed_read_reaches_the_caller(self):
        def read(indices, raw):
            if indices == [2]:
                raise UserError("the disk is gone")

        batches = iter(BatchStream([[i] for i in range(9)], read, {}, {}, threads=2))
        assert [next(batches).indices for _ in range(2)] == [[0], [1]]
        with pytest.raises(UserError, match="the disk is gone"):
            next(batches)

    def test_its_threads_end_with_it(self, miniature):
        dataset = open_dataset(miniature)
        batches = iter(stream_of(dataset, [[0]] * 100, threads=3))
        next(batches)
        batches.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.mark.parametrize("damage", ["teacher of another name", "shard gone", "manifest gone"])
def test_a_cache_that_does_not_fit_is_one_line(miniature, tmp_path, damage):
    root = tmp_path / "copy"
    shutil.copytree(miniature / "cache", root / "cache")
    shutil.copy(miniature / "train.csv", root / "train.csv")
    if damage == "shard gone":
        (root / "cache" / "tokens" / "shard-00000.lmdb").unlink()
    else:
        manifest = root / "cache" / "tokens" / "manifest.json"
        changed = json.loads(manifest.read_text()) | {"field": "latents"}
        manifest.unlink() if damage == "manifest gone" else manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError) as error:
        open_dataset(root)
    assert "\n" not in str(error.value)


def test_reading_rows_equals_reading_ids(miniature):
    reader = FieldReader(miniature / "cache" / "tokens", "tokens")
    ids = [reader.ids[i] for i in (5, 0, 17)]
    raw = torch.empty(3, reader.spec.value_bytes, dtype=torch.uint8)
    reader.read_rows(reader.rows(ids), raw.numpy())
    assert reader.spec.decode(raw).equal(reader.read(ids))
    assert np.array_equal(reader.rows(ids), [5, 0, 17])


def test_reader_threads_use_the_gpu_of_their_process(monkeypatch):
    """A new thread would begin with the machine's first GPU, and pinned memory would open it."""
    chosen, readers = set(), set()
    monkeypatch.setattr(BatchStream, "_device", lambda stream: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.add((threading.get_ident(), index)))
    read = lambda indices, raw: readers.add((threading.get_ident(), 3))  # noqa: E731
    assert len(list(BatchStream([[0], [1], [2], [3]], read, {"latent": 8}, {}, threads=2))) == 4
    assert readers
    assert readers <= chosen
