"""What the study of a transformer needs: an untrained MMDiT in Stable Diffusion 3's folder, and changed digits."""

import shutil

import numpy as np
import pytest
import torch
from conftest import run_numbered
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from transformers import CLIPTextModel

from miniature import digits, make
from models.aligned import AlignedModel
from models.families.table import family_of


@pytest.fixture(scope="module")
def demo(miniature, tmp_path_factory):
    """A finished quick demo, to which the same script adds what the option asks for."""
    out = tmp_path_factory.mktemp("transformer") / "demo"
    shutil.copytree(miniature, out)
    run_numbered("0_make_demo", "--out", out, "--quick", "--transformer")
    return out


@pytest.fixture(scope="module")
def pipeline(demo):
    found = StableDiffusion3Pipeline.from_pretrained(demo / "models" / make.DIGITS)
    found.set_progress_bar_config(disable=True)
    return found


def test_the_stock_pipeline_draws_with_the_autoencoder_of_the_demo(demo, pipeline) -> None:
    torch.manual_seed(0)
    noise = torch.randn(1, 4, 16, 16)
    pixels = pipeline(
        "three", num_inference_steps=2, latents=noise, height=32, width=32, output_type="pt"
    ).images
    # The prediction of the untrained network is 0, so that the latents stay the noise.
    vae = pipeline.vae
    expected = vae.decode(noise / vae.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pixels, expected)


def test_every_block_begins_as_the_identity(pipeline) -> None:
    network, read = pipeline.transformer, []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda _, args, kwargs, out: read.append((kwargs, out)), with_kwargs=True)
    network(
        hidden_states=torch.randn(2, 4, 16, 16), timestep=torch.tensor([10.0, 900.0]),
        encoder_hidden_states=torch.randn(2, 5, 64), pooled_projections=torch.randn(2, 64),
    )  # fmt: skip
    assert len(read) == 6
    for given, (_, picture) in read:
        assert torch.equal(picture, given["hidden_states"])


def test_text_is_that_of_the_trained_encoder(demo, pipeline) -> None:
    stable_diffusion = CLIPTextModel.from_pretrained(demo / "models/sd15-mini/text_encoder")
    ids = pipeline.tokenizer(["seven"], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 8)
    own = pipeline.encode_prompt(
        "seven", None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    with torch.no_grad():
        torch.testing.assert_close(own[2], stable_diffusion(ids).pooler_output.repeat(1, 2))
    assert own[0].shape == (1, 16, 64)


def test_features_are_cells_of_the_patches_that_the_network_has(demo) -> None:
    family = family_of(str(demo / "models" / make.DIGITS))
    model = AlignedModel(family, family.load_network(), ["block2"], 64, train="full")
    text = {"prompt_embeds": torch.randn(2, 16, 64), "pooled_prompt_embeds": torch.randn(2, 64)}
    model.predict(torch.randn(2, 4, 16, 16), torch.tensor([0.1, 0.9]), text, capture=True)
    assert model.get_aligned_tokens((4, 4))["block2"].shape == (2, 16, 64)


def test_the_turned_digits_are_the_same_ones(demo) -> None:
    for split in ("train", "val"):
        files = sorted((demo / "ILSVRC/Data/CLS-LOC" / split).glob("*/*"))
        turned = sorted((demo / digits.TURNED / "Data/CLS-LOC" / split).glob("*/*"))
        assert [f.name for f in files] == [f.name for f in turned]
        for file, other in list(zip(files, turned, strict=True))[::10]:
            digit, found = (
                np.asarray(Image.open(f).convert("L").crop((4, 0, 36, 32)), float) for f in (file, other)
            )
            assert np.abs(found - np.rot90(digit)).mean() < 8  # of 255; JPEG changes both
