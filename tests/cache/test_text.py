"""Text as a field of shards: prompts, named fields, labels, and what a training reads of them."""

import json
import zlib

import pytest
import torch

from cache.batch_stream import BatchStream, TrainingBatches
from cache.dataset import AlignedDataset
from cache.image_list import Sample, write_samples
from cache.manifest import FieldSpec, TextSpec, read_manifest
from cache.shards import FieldWriter
from cache.text import (
    TABLE_BYTES,
    TextReader,
    class_names,
    drop_captions,
    join_prompts,
    keeps_table,
    open_writer,
    read_text_manifest,
    shown_prompts,
    table_bytes,
    text_digest,
    write_text,
)
from common.errors import UserError

CPU = torch.device("cpu")
# A row of these takes 8 + 6 + 6 + 3 = 23 bytes, padded to 24.
NAMED = {
    "mask": {"shape": [3], "dtype": "uint8"},
    "embeds": {"shape": [3, 1], "dtype": "bfloat16"},
    "pooled": {"shape": [2], "dtype": "float32"},
    "more": {"shape": [1, 3], "dtype": "float16"},
}
TYPES = {"mask": torch.uint8, "embeds": torch.bfloat16, "pooled": torch.float32, "more": torch.float16}
SPEC = TextSpec.of(NAMED, "random numbers", {"model": "m"}, {"template": "a photo of a {class_name}"})


def values_of(prompts):
    """Fields `(n, …)` that depend on the prompt alone, so that equal prompts have equal rows."""
    rows = {name: [] for name in NAMED}
    for prompt in prompts:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        for name, form in NAMED.items():
            row = torch.randn(form["shape"], generator=generator)
            rows[name].append((row > 0).to(torch.uint8) if name == "mask" else row.to(TYPES[name]))
    return {name: torch.stack(found) for name, found in rows.items()}


NULL_ROW = {name: values[0] for name, values in values_of(["the null prompt"]).items()}


def listed_of(classes=(), captions=(), synsets=()):
    prompts = [*(f"a photo of a {name}" for name in classes), *captions]
    return {"n_classes": len(classes), "synsets": list(synsets), "prompts": prompts}


def write(folder, listed, spec=SPEC, **options):
    write_text(folder, spec, listed, values_of(listed["prompts"]), NULL_ROW, **options)
    return TextReader(folder)


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_named_fields_and_masks_are_read_as_they_were_written(tmp_path):
    names = [f"class {i}" for i in range(9)]
    text = write(tmp_path, listed_of(names), shard_size=4)
    assert SPEC.value_bytes == 24
    assert text.fields_of(range(9)).keys() == NAMED.keys()
    assert {name: values.dtype for name, values in text.null.items()} == TYPES
    expected = values_of(text.prompts)
    for labels in (range(9), [7, 0, 7], torch.tensor([3]), [8]):
        assert equal(text.fields_of(labels), {n: v[torch.as_tensor([*labels])] for n, v in expected.items()})
    assert equal(text.null, NULL_ROW)
    assert text.shapes == {"mask": (3,), "embeds": (3, 1), "pooled": (2,), "more": (1, 3)}
    table = text.on(CPU, torch.float32)
    assert table.fields_of(torch.tensor([2]))["embeds"].equal(expected["embeds"][[2]].float())
    assert table.fields_of(torch.tensor([2]))["mask"].dtype == torch.uint8
    assert text.reader.damaged_shards() == []


def test_a_row_of_one_prompt_can_be_decoded_wherever_it_lies():
    raw = SPEC.encode(values_of(["a", "b", "c"]))
    for i, prompt in enumerate("abc"):
        assert equal(SPEC.decode(raw[i : i + 1]), values_of([prompt]))
    with pytest.raises(ValueError, match="embeds: expected"):
        SPEC.encode(values_of("a") | {"embeds": torch.zeros(1, 4, 1)})


def test_equal_prompts_are_stored_once_and_labels_keep_the_order_of_classes(tmp_path):
    text = write(tmp_path, listed_of(["crane", "tench", "crane"]))
    assert text.manifest["num_samples"] == 3  # and the null prompt
    assert len(text) == text.n_classes == 3
    rows = text.fields_of([0, 1, 2])
    assert rows["more"][0].equal(rows["more"][2])
    assert not rows["more"][0].equal(rows["more"][1])
    assert text.label_of == {"a photo of a crane": 0, "a photo of a tench": 1}


def test_the_null_prompt_is_not_the_prompt_without_a_letter(tmp_path):
    text = write(tmp_path, listed_of(captions=["", "a dog"]))
    assert not text.fields_of([0])["pooled"][0].equal(text.null["pooled"])


def test_a_longer_list_adds_shards_and_moves_no_label(tmp_path):
    first = write(tmp_path, listed_of(captions=["a", "b", "c"]), shard_size=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(before) == 2 * 2
    longer = join_prompts(tmp_path, listed_of(captions=["new", "c", "a", "newer"]))
    assert longer["prompts"] == ["a", "b", "c", "new", "newer"]
    open_writer(tmp_path, SPEC, longer).close()
    assert json.loads((tmp_path / "prompts.json").read_text()) == longer
    assert TextReader(tmp_path).prompts == first.prompts  # while the new rows are being made
    text = write(tmp_path, longer)
    assert equal(text.fields_of(range(5)), values_of(longer["prompts"]))
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(after) == 2 * 3
    assert before.items() <= after.items()


def test_two_parts_are_written_by_two_writers(tmp_path):
    listed = listed_of(captions=list("abcdefg"))
    write_text(tmp_path, SPEC, listed, values_of(listed["prompts"]), NULL_ROW, part=(1, 2), shard_size=2)
    with pytest.raises(UserError, match="is not finished"):
        TextReader(tmp_path)
    write_text(tmp_path, SPEC, listed, values_of(listed["prompts"]), NULL_ROW, part=(0, 2))
    assert equal(TextReader(tmp_path).fields_of(range(7)), values_of("abcdefg"))


def test_the_digest_is_that_of_prompts_and_numbers_and_not_of_shards(tmp_path):
    listed = listed_of(["a", "b", "c"])
    digests = []
    for name, more, size in (("one", {}, 9), ("two", {}, 1), ("three", {"pooled": torch.zeros(3, 2)}, 9)):
        write_text(
            tmp_path / name, SPEC, listed, values_of(listed["prompts"]) | more, NULL_ROW, shard_size=size
        )
        digests.append(text_digest(read_text_manifest(tmp_path / name)))
    assert digests[0] == digests[1] != digests[2]


def test_large_text_gets_shards_of_fewer_rows(tmp_path):
    spec = TextSpec.of({"embeds": {"shape": [64, 2**20], "dtype": "float16"}}, "x", {}, {})
    open_writer(tmp_path, spec, listed_of(captions=["a"])).close()
    assert json.loads((tmp_path / "settings.json").read_text())["shard_size"] == 32


class TestRefusals:
    def test_a_table_of_the_older_format(self, tmp_path):
        write(tmp_path, listed_of(["a"]))
        (tmp_path / "text.safetensors").write_bytes(b"")
        for read in (TextReader, class_names, lambda folder: join_prompts(folder, listed_of(["a"]))):
            with pytest.raises(UserError, match=r"older format .*: delete it and run script 4 again"):
                read(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda listed: listed["prompts"].reverse(),
            lambda listed: listed["prompts"].pop(),
            lambda listed: listed.update(n_classes=1),
            lambda listed: listed["prompts"].__setitem__(0, "another"),
            lambda listed: listed["synsets"].append("n1"),
        ],
    )
    def test_prompts_that_were_edited(self, tmp_path, change):
        listed = listed_of(["a", "b"], ["a caption"])
        write(tmp_path, listed)
        edited = json.loads((tmp_path / "prompts.json").read_text())
        change(edited)
        (tmp_path / "prompts.json").write_text(json.dumps(edited))
        with pytest.raises(UserError, match=r"prompts\.json is not the one that its manifest describes"):
            TextReader(tmp_path)
        (tmp_path / "prompts.json").unlink()
        with pytest.raises(UserError, match=r"cannot read .*prompts\.json"):
            TextReader(tmp_path)
        assert write(tmp_path, listed).prompts == listed["prompts"]  # as the remedy says

    def test_other_classes(self, tmp_path):
        write(tmp_path, listed_of(["a", "b"], synsets=["n1", "n2"]))
        for other in (
            listed_of(["b", "a"], synsets=["n1", "n2"]),
            listed_of(["a", "b", "c"], synsets=["n1", "n2"]),
            listed_of(["a", "b"], synsets=["n1", "n3"]),
            listed_of(captions=["a dog"]),
        ):
            with pytest.raises(UserError, match="was made for other classes"):
                join_prompts(tmp_path, other)
        more = join_prompts(tmp_path, listed_of(["a", "b"], ["a dog"], synsets=["n1", "n2"]))
        assert more["prompts"][2:] == ["a dog"]

    def test_other_settings_before_the_prompts_are_touched(self, tmp_path):
        write(tmp_path, listed_of(["a"]))
        before = (tmp_path / "prompts.json").read_bytes()
        other = TextSpec.of(NAMED, "random numbers", {"model": "another"}, SPEC.details)
        with pytest.raises(UserError, match="was written with another source"):
            open_writer(tmp_path, other, listed_of(["a"], ["a dog"]))
        assert (tmp_path / "prompts.json").read_bytes() == before

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
    def test_what_is_not_finite_as_it_is_stored(self, tmp_path, bad):
        fields = values_of(["a", "b"])
        fields["more"] = fields["more"].float()
        fields["more"][1, 0, 2] = bad
        with pytest.raises(UserError, match=r"are not finite .*: store them with another --dtype"):
            write_text(tmp_path, SPEC, listed_of(captions=["a", "b"]), fields, NULL_ROW)

    def test_a_manifest_whose_fields_do_not_fill_a_row(self, tmp_path):
        write(tmp_path, listed_of(["a"]))
        for name in ("manifest", "settings"):
            content = json.loads((tmp_path / f"{name}.json").read_text())
            content["details"]["fields"]["pooled"]["shape"] = [8]
            content.pop("seal", None)
            if name == "manifest":
                from cache.manifest import digest_of

                content["seal"] = digest_of(content)
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"contradicts itself \(shape and details.fields\)"):
            TextReader(tmp_path)


def test_a_picture_shows_names_of_classes_and_the_beginning_of_captions(tmp_path):
    write(tmp_path, listed_of(["tench", "great white shark"], ["short", "x" * 50]))
    assert shown_prompts(tmp_path) == ["tench", "great white shark", "short", "x" * 30 + " …"]
    assert class_names(tmp_path) == ["tench", "great white shark"]


def test_a_table_stays_on_the_device_up_to_two_gigabytes():
    size = table_bytes([(77, 768)], 1000, torch.bfloat16)
    assert size == 1001 * 77 * 768 * 2
    assert keeps_table("auto", TABLE_BYTES)
    assert not keeps_table("auto", TABLE_BYTES + 1)
    assert keeps_table(True, TABLE_BYTES + 1)
    assert not keeps_table(False, 1)


def test_captions_are_dropped_from_all_fields_together_masks_too():
    text, null = values_of([f"{i}" for i in range(200)]), NULL_ROW
    kept = drop_captions(text, null, 0.5, torch.Generator().manual_seed(0))
    dropped = [all(kept[name][i].equal(null[name]) for name in null) for i in range(200)]
    whole = [all(kept[name][i].equal(text[name][i]) for name in null) for i in range(200)]
    assert all(a != b for a, b in zip(dropped, whole, strict=True))
    assert 70 < sum(dropped) < 130
    assert kept["mask"].dtype == torch.uint8


@pytest.fixture(params=["classes", "captions"])
def cached(request, tmp_path):
    """A folder with a list of 12 images, latents and text, and the prompt of each image."""
    ids = [f"i{i}" for i in range(12)]
    spec = FieldSpec("latents", (4, 2, 2), "float16", "x", details={"posterior": "mode", "scaled": True})
    writer = FieldWriter(tmp_path / "latents", spec, ids)
    for shard, keys in writer.pending(12):
        writer.put(shard, keys, spec.encode(torch.randn(12, 4, 2, 2)))
    writer.finish()
    if request.param == "classes":
        write_samples(tmp_path / "list.csv", [Sample(key, "x", i % 3, "n") for i, key in enumerate(ids)])
        write(tmp_path / "text", listed_of(["crane", "tench", "crane"], ["a further prompt"]))
        return tmp_path, [f"a photo of a {['crane', 'tench', 'crane'][i % 3]}" for i in range(12)]
    captions = [f"caption {i % 5}" for i in range(12)]
    samples = [Sample(key, key, None, "", prompt) for key, prompt in zip(ids, captions, strict=True)]
    write_samples(tmp_path / "list.csv", samples)
    write(tmp_path / "text", listed_of(captions=["another", *dict.fromkeys(reversed(captions))]))
    return tmp_path, captions


def open_dataset(folder):
    return AlignedDataset(folder / "list.csv", folder / "latents", None, folder / "text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_from_the_table_and_text_read_with_the_batch_are_bit_equal(cached, dtype):
    folder, prompts = cached
    batches = [[0, 5, 9, 2], [11, 1, 3, 3]]
    made = []
    for reads in (False, True):
        dataset = open_dataset(folder)
        if reads:
            dataset.read_text_with_batches()
        training = TrainingBatches(dataset, CPU, dtype, caption_dropout=0.5)
        assert (training.table is None) == reads
        generator = torch.Generator().manual_seed(2)
        stream = BatchStream(batches, dataset.read_batch, dataset.value_bytes, dataset.decode)
        made.append([training(batch, generator, with_tokens=False).text for batch in stream])
        asked = training.prompts(torch.tensor([0, 1]))
        assert asked["embeds"].equal(values_of(dataset.text.prompts[:2])["embeds"].to(dtype))
    for table, read in zip(*made, strict=True):
        assert equal(table, read)
    expected = values_of([prompts[i] for i in batches[0]])
    kept = [i for i in range(4) if not made[0][0]["pooled"][i].equal(NULL_ROW["pooled"].to(dtype))]
    assert 0 < len(kept) < 4
    for i in kept:
        assert made[0][0]["embeds"][i].equal(expected["embeds"][i].to(dtype))
        assert made[0][0]["mask"][i].equal(expected["mask"][i])


def test_labels_and_items_are_those_of_the_prompts(cached):
    folder, prompts = cached
    dataset = open_dataset(folder)
    assert [dataset.text.prompts[label] for label in dataset.labels] == prompts
    item = dataset[7]
    assert item["embeds"].equal(values_of([prompts[7]])["embeds"][0])
    assert item["label" if dataset.captioned else "class_id"] == dataset.labels[7]


def test_a_label_that_the_text_lacks_is_one_line(cached):
    folder, _ = cached
    (folder / "few").mkdir()
    if open_dataset(folder).captioned:
        write(folder / "few" / "text", listed_of(captions=["caption 0"]))
        says = r"lacks the prompt of i1 \('caption 1'\): run script 4 with --csv"
    else:
        write(folder / "few" / "text", listed_of(["crane"], ["a", "b", "c"]))
        says = "has class 2, .* only 1 classes: run script 4 again"
    with pytest.raises(UserError, match=says):
        AlignedDataset(folder / "list.csv", folder / "latents", None, folder / "few" / "text")


def test_a_manifest_of_text_counts_its_rows(tmp_path):
    write(tmp_path, listed_of(["crane", "crane"], ["a dog"]))
    manifest = read_manifest(tmp_path, "text")
    assert (manifest["num_prompts"], manifest["num_samples"]) == (3, 3)
