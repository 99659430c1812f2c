"""Text of fewer tokens than a pipeline makes by default (--max-sequence-length): made, stored, trained on, or refused."""

import diffusers
import pytest
import torch
from conftest import run_numbered

from cache.text import TextReader, is_shorter
from common.errors import UserError
from models.families.table import family_of

PROMPTS = ("a three", "a photo of a seven, drawn by hand")
LENGTH = 6


@pytest.fixture(scope="module")
def text_of(base_of, tmp_path_factory):
    """The text that script 4 makes of the prompts for a family."""
    root = tmp_path_factory.mktemp("text")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "classes.json").write_text('{"0": "nought"}')

    def text(family: str, length: int = LENGTH) -> TextReader:
        out = root / f"{family}_{length}"
        options = ["--prompts", root / "prompts.txt", "--base", base_of(family), "--dtype", "float32"]
        options += ["--class-names", root / "classes.json", "--out", out, "--max-sequence-length", length]
        run_numbered("4_prepare_text_embeddings", *options)
        return TextReader(out)

    return text


def test_the_text_is_what_the_pipeline_makes_with_this_length(text_of, base_of) -> None:
    text, stock = text_of("sd3"), diffusers.StableDiffusion3Pipeline.from_pretrained(base_of("sd3"))
    expected = stock.encode_prompt(list(PROMPTS), None, None, max_sequence_length=LENGTH)
    found = text.fields_of([text.label_of[prompt] for prompt in PROMPTS])
    torch.testing.assert_close(found["prompt_embeds"], expected[0])
    torch.testing.assert_close(found["pooled_prompt_embeds"], expected[2])
    torch.testing.assert_close(text.null["prompt_embeds"], expected[1][0])
    assert text.null["prompt_embeds"].shape[0] == 77 + LENGTH
    reads = family_of(base_of("sd3")).text_shapes(stock.transformer)
    assert is_shorter("prompt_embeds", text.shapes["prompt_embeds"], reads["prompt_embeds"])


@pytest.mark.parametrize(
    ("family", "length", "why"),
    [
        ("sd3", 257, "at most 256"),
        ("sdxl", LENGTH, "takes no such length"),
        ("sd15", LENGTH, "no such length"),
    ],
)
def test_a_length_that_the_pipeline_does_not_have_is_refused(text_of, family, length, why) -> None:
    with pytest.raises(UserError, match=rf"--max-sequence-length {length}: .*{why}.*leave it out"):
        text_of(family, length)


@pytest.mark.parametrize(
    ("name", "held", "reads", "fits"),
    [
        ("prompt_embeds", (5, 8), (9, 8), True),
        ("prompt_embeds", (9, 4), (9, 8), False),
        ("prompt_embeds", (12, 8), (9, 8), False),
        ("prompt_embeds", (5, 4), (9, 8), False),
        ("prompt_embeds_llama3", (3, 5, 8), (3, 9, 8), True),
        ("prompt_embeds_llama3", (2, 5, 8), (3, 9, 8), False),
        ("prompt_attention_mask", (5,), (9,), True),
        ("pooled_prompt_embeds", (5,), (9,), False),
        ("prompt_embeds", (5, 3, 8), (9, 8), False),
    ],
)
def test_only_the_length_may_be_less(name, held, reads, fits) -> None:
    assert is_shorter(name, held, reads) == fits
