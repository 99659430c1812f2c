"""Script 4: the prompts of classes and of captions, encoded by a family's text encoders into shards."""

import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import run_numbered

from cache.image_list import Sample, write_samples
from cache.manifest import read_manifest
from cache.text import TextReader
from common.errors import UserError
from models.families.sd15 import SD15
from models.families.table import family_of
from preprocessing import text_fields

CPU = torch.device("cpu")
NAMES = {"0": "crane", "1": "great white shark", "2": "crane"}
LENGTH = 6  # positions of the fake family's prompts; it makes one token of each word


class FakeFamily(SD15):
    """A family of two named fields and a mask, whose rows are garbage behind the mask; its null prompt has two tokens."""

    trimmed_text = {"embeds": "mask"}  # noqa: RUF012
    dtype, scale, calls = torch.float32, 1.0, 0

    def encode_text(self, prompts, device):
        type(self).calls += 1
        words = torch.tensor([len(prompt.split()) for prompt in prompts])
        mask = (torch.arange(LENGTH) < words[:, None]).to(torch.uint8)  # (n, L)
        tokens = torch.tensor([[hash_of(prompt, i) for i in range(LENGTH)] for prompt in prompts])[..., None]
        embeds = torch.where(mask[..., None] > 0, tokens, 7.0).expand(-1, -1, 2)  # (n, L, 2)
        embeds = (embeds * self.scale).to(self.dtype)
        return {"embeds": embeds, "mask": mask, "pooled": embeds[:, 0]}

    def null_text(self, device):
        return {name: values[0] for name, values in self.encode_text(["null prompt"], device).items()}

    def prompt_encoder(self, device):
        weights = torch.nn.Linear(2, 2, dtype=self.dtype)
        with torch.no_grad():
            weights.weight.fill_(1), weights.bias.fill_(0)
        return SimpleNamespace(weights=weights)


def hash_of(prompt, i):
    return (sum(prompt.encode()) * (i + 1)) % 251 / 16


@pytest.fixture
def fake(monkeypatch):
    """The fake family in place of that of every base model; returns its class, of which a test may change the facts."""
    kind = type("Family", (FakeFamily,), {})
    monkeypatch.setattr(text_fields, "family_of", lambda base, revision: kind(base, revision))
    return kind


def captions(path, prompts):
    write_samples(path, [Sample(str(i), "x", None, "", prompt) for i, prompt in enumerate(prompts)])
    return path


def script(out, *more):
    run_numbered("4_prepare_text_embeddings", "--out", out, *more)
    return TextReader(out)


def checksums(folder):
    return [shard["checksum"] for shard in read_manifest(folder, "text")["shards"]]


PROMPTS = [f"caption {'word ' * (i % 3)}{i}" for i in range(11)]  # two to four words


def test_classes_and_further_prompts_of_the_real_encoder(miniature, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    (tmp_path / "more.txt").write_text("a dog on a beach\n\na photo of a crane\na cat\n", encoding="utf-8")
    base = str(miniature / "models" / "sd15-mini")
    text = script(
        tmp_path / "text",
        "--class-names",
        tmp_path / "names.json",
        "--base",
        base,
        "--prompts",
        tmp_path / "more.txt",
    )
    classes = ["a photo of a crane", "a photo of a great white shark", "a photo of a crane"]
    assert text.prompts == [*classes, "a dog on a beach", "a cat"]
    assert text.n_classes == 3
    family = family_of(base)
    expected = family.encode_text(text.prompts, CPU)["prompt_embeds"].half()
    assert (text.fields_of(range(5))["prompt_embeds"].float() - expected.float()).abs().max() < 2e-3
    assert text.null["prompt_embeds"].equal(family.null_text(CPU)["prompt_embeds"].half())
    source = text.spec.source
    assert source["model"] == base
    assert source["precision"] == "fp32"
    assert source["transformers"]
    assert {"tokenizers", "ftfy", "bs4"} <= source.keys()
    assert text.spec.details["template"] == "a photo of a {class_name}"


def test_captions_in_order_of_appearance_trimmed_to_the_longest_prompt(fake, tmp_path, capsys):
    first = captions(tmp_path / "a.csv", [*PROMPTS, PROMPTS[0]])
    second = captions(tmp_path / "b.csv", ["another", PROMPTS[3]])
    text = script(tmp_path / "text", "--csv", first, second, "--batch-size", 3)
    assert text.prompts == [*PROMPTS, "another"]
    assert text.n_classes == 0
    said = capsys.readouterr().out
    assert "all prompts are encoded twice" in said
    assert "the longest prompt has 4 positions in mask" in said
    assert text.shapes == {"embeds": (4, 2), "mask": (4,), "pooled": (2,)}
    assert text.spec.details["trimmed"] == {"embeds": "mask"}
    whole, stored = fake("x").encode_text(text.prompts, CPU), text.fields_of(range(12))
    assert whole["mask"].sum(1).max() == 4
    for name in whole:
        assert stored[name].float().equal(whole[name][:, :4].float() if name != "pooled" else whole[name])
    assert text.null["mask"].tolist() == [1, 1, 0, 0]


def test_a_longer_list_adds_shards_and_a_longer_prompt_is_refused(fake, tmp_path):
    first = captions(tmp_path / "a.csv", PROMPTS)
    script(tmp_path / "text", "--csv", first, "--shard-size", 5, "--batch-size", 2)
    before = checksums(tmp_path / "text")
    more = captions(tmp_path / "b.csv", ["new one", *PROMPTS[4:], "new two"])
    fake.calls = 0
    text = script(tmp_path / "text", "--csv", more, "--batch-size", 2)
    assert text.prompts == [*PROMPTS, "new one", "new two"]
    assert checksums(tmp_path / "text")[:3] == before
    assert fake.calls == 3  # the null prompt, the first batch, and the new prompts
    longer = captions(tmp_path / "c.csv", ["one two three four five"])
    with pytest.raises(
        UserError, match=r"longer than the 4 positions that .*/text stores: choose another --out"
    ):
        script(tmp_path / "text", "--csv", longer)


@pytest.mark.parametrize(
    ("facts", "options", "stored"),
    [
        ({}, [], "float16"),
        ({"dtype": torch.bfloat16}, [], "bfloat16"),
        ({"scale": 1e5}, [], "bfloat16"),  # beyond fp16
        ({"scale": 1e5}, ["--dtype", "float32"], "float32"),
        ({"dtype": torch.bfloat16}, ["--dtype", "float16"], "float16"),
    ],
)
def test_the_type_in_which_fields_are_stored(fake, tmp_path, facts, options, stored):
    for name, value in facts.items():
        setattr(fake, name, value)
    listed = captions(tmp_path / "a.csv", PROMPTS)
    text = script(tmp_path / "text", "--csv", listed, *options)
    kinds = {name: form["dtype"] for name, form in text.spec.fields.items()}
    assert kinds == {"embeds": stored, "pooled": stored, "mask": "uint8"}
    assert text.spec.source["precision"] == ("bf16" if "dtype" in facts else "fp32")
    expected = fake("x").encode_text(text.prompts, CPU)["pooled"].to(getattr(torch, stored))
    assert text.fields_of(range(11))["pooled"].equal(expected)
    # A folder keeps its types, whatever the first prompts of a longer list would ask for.
    fake.scale = 1e-3
    more = captions(tmp_path / "b.csv", ["tiny", *PROMPTS])
    assert script(tmp_path / "text", "--csv", more, *options).spec == text.spec


def test_a_later_prompt_that_overflows_is_one_line(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "scale", property(lambda self: 1e5 if type(self).calls > 6 else 1.0))
    listed = captions(tmp_path / "a.csv", PROMPTS)
    with pytest.raises(
        UserError, match=r"not finite numbers as .*: store them with another --dtype in another folder"
    ):
        script(tmp_path / "text", "--csv", listed, "--batch-size", 3)


@pytest.mark.parametrize("kill_at", [7, 8, 10])
def test_a_killed_script_goes_on_where_it_stopped(fake, tmp_path, kill_at):
    """The first call is the null prompt's, four find the longest prompt, one decides the types, five store rows."""
    listed = captions(tmp_path / "a.csv", PROMPTS)
    options = ["--csv", listed, "--batch-size", 3, "--shard-size", 5]
    undisturbed = script(tmp_path / "undisturbed", *options)
    encode = fake.encode_text

    def encode_or_die(self, prompts, device):
        if fake.calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, prompts, device)

    def run_and_die():
        fake.calls, fake.encode_text = 0, encode_or_die
        script(tmp_path / "text", *options)

    child = multiprocessing.get_context("fork").Process(target=run_and_die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match="is not finished"):
        TextReader(tmp_path / "text")
    text = script(tmp_path / "text", *options)
    assert checksums(tmp_path / "text") == checksums(tmp_path / "undisturbed")
    assert text.prompts == undisturbed.prompts


def test_two_processes_write_their_own_shards(fake, tmp_path, capsys):
    listed = captions(tmp_path / "a.csv", PROMPTS)
    options = ["--csv", listed, "--batch-size", 3, "--shard-size", 5]
    whole = script(tmp_path / "whole", *options)
    with pytest.raises(UserError, match="is not finished"):
        script(tmp_path / "text", *options, "--shard", "1/2")
    assert "part 1 of 2 is done, 1 of 3 shards are there" in capsys.readouterr().out
    text = script(tmp_path / "text", *options, "--shard", "0/2")
    assert "12 text embeds (4, 2) float16" in capsys.readouterr().out
    assert checksums(tmp_path / "text") == checksums(tmp_path / "whole")
    assert text.prompts == whole.prompts


def test_a_finished_folder_is_left_alone(fake, tmp_path):
    listed = captions(tmp_path / "a.csv", PROMPTS)
    script(tmp_path / "text", "--csv", listed)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "text").iterdir()}
    script(tmp_path / "text", "--csv", listed)
    fewer = captions(tmp_path / "b.csv", PROMPTS[:3])
    assert script(tmp_path / "text", "--csv", fewer).prompts == PROMPTS
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "text").iterdir()} == before


def test_a_list_without_prompts_is_one_line(miniature, tmp_path):
    with pytest.raises(
        UserError, match=r"train\.csv has no prompts: give a list with the columns id, img_path, prompt"
    ):
        script(
            tmp_path / "text", "--csv", miniature / "train.csv", "--base", miniature / "models" / "sd15-mini"
        )


def test_too_little_disk_is_known_before_anything_is_encoded(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.pipeline.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs .* and the disk has 0.0 MB"):
        script(tmp_path / "text", "--csv", captions(tmp_path / "a.csv", PROMPTS))
