import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import demo_overrides, run_numbered
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

import train as train_script
from cache.reader import FieldReader
from cache.views import cut_view
from common.errors import UserError
from configs.loading import load_config
from models.latents import LatentCodec
from models.teachers.dinov2 import DINOv2Encoder
from models.teachers.online import OnlineTeacher, load_decoder
from training.parts import build_parts
from training.run_folder import RunFolder

CONFIG = "configs/demo.yaml"


def encoder(patch=8, grid=4):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=patch
    )
    return DINOv2Encoder(Dinov2Model(config), grid)


def tiny():
    """An AutoencoderTiny that decodes 16×16 latents to 32 px."""
    torch.manual_seed(1)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def vae():
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip


def online(miniature, *more):
    return [
        "teacher.source=online",
        f"teacher.model={miniature}/models/dinov2-mini",
        "data.tokens=null",
        *more,
    ]


@pytest.mark.parametrize("decoder", [tiny, vae])
def test_tokens_are_those_of_the_decoded_picture(decoder):
    """Against the teacher on the picture, decoded and unscaled by hand."""
    decoder, teacher = decoder().eval(), encoder()
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scale = 0.5 if isinstance(decoder, AutoencoderKL) else 1.0
        picture = ((decoder.decode(latents / scale).sample + 1) / 2).clamp(0, 1)
        assert picture.shape == (3, 3, 32, 32)
        expected = F.normalize(teacher(picture), dim=-1)
    tokens = OnlineTeacher(LatentCodec(decoder), teacher)(latents)
    assert tokens.shape == (3, 16, 32)
    torch.testing.assert_close(tokens, expected)
    assert not tokens.requires_grad


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_images_are_decoded_at_a_time_in_the_precision_of_the_training(bf16):
    """Decoding a batch of 48 at once in fp32 takes 39 GB in passing at 512 px."""
    decoder, teacher, seen = vae(), encoder(), []
    decoder.decoder.conv_in.register_forward_hook(
        lambda module, args, output: seen.append((len(output), output.dtype))
    )
    latents = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = OnlineTeacher(LatentCodec(decoder), teacher, bf16=bf16)(latents)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == [(8, dtype), (8, dtype), (4, dtype)]
    assert tokens.dtype == torch.float32
    whole = OnlineTeacher(LatentCodec(decoder), teacher)(latents[11:12])
    torch.testing.assert_close(tokens[11:12], whole, atol=0.05 if bf16 else 1e-5, rtol=0)


def test_the_picture_is_resized_as_the_cached_teacher_sees_it():
    """Against the same picture written as pixels and cut by PIL, as script 3 does."""

    class Identity(torch.nn.Module):
        def decode(self, x_0):
            return x_0

    # Noise: without its low-pass filter a resizing would fold the detail into the smaller picture.
    pixels = torch.randint(256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(0)).float()
    image = Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy())
    seen = torch.from_numpy(np.array(cut_view(image, 32, "aligned"))).permute(2, 0, 1)[None].float() / 255
    teacher = encoder()
    expected = F.normalize(teacher(seen), dim=-1)
    tokens = OnlineTeacher(Identity(), teacher)(pixels / 127.5 - 1)
    assert F.cosine_similarity(tokens, expected, dim=-1).min() > 0.9995


def test_online_tokens_resemble_the_cached_ones_as_far_as_the_vae_is_faithful(miniature, tmp_path):
    """The smallest demo's VAE is hardly trained; tokens of its own reconstruction must still be exactly those of script 3."""
    parts = build_parts(load_config(CONFIG, demo_overrides(miniature, tmp_path / "run", *online(miniature))))
    latents = parts.dataset.x_0(
        FieldReader(miniature / "cache" / "latents", "latents").read(parts.dataset.ids[:8])
    )
    tokens = parts.online(latents)
    decoder = AutoencoderKL.from_pretrained(miniature / "models" / "sd15-mini", subfolder="vae")
    root = tmp_path / "ILSVRC" / "train" / "n00000000"
    root.mkdir(parents=True)
    with torch.no_grad():
        pictures = decoder.decode(latents / decoder.config.scaling_factor).sample
    for i, picture in enumerate(pictures):
        pixels = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{i}.png")
    csv = tmp_path / "list.csv"
    run_numbered(
        "1_sample_imagenet_subset", "--imagenet", tmp_path / "ILSVRC", "--per-class", 8, "--out", csv
    )
    teacher = ["--teacher", miniature / "models" / "dinov2-mini", "--grid", 4]
    run_numbered("3_build_dino_cache", "--csv", csv, "--workers", 0, "--out", tmp_path / "tokens", *teacher)
    reader = FieldReader(tmp_path / "tokens", "tokens")
    ids = sorted(reader.ids, key=lambda key: int(key.rsplit("/", 1)[-1].rsplit("_", 1)[-1]))
    assert F.cosine_similarity(tokens, reader.read(ids).float(), dim=-1).min() > 0.99


def test_a_run_without_a_cache_trains_and_resumes_exactly(miniature, tmp_path, monkeypatch):
    def train(run, *more):
        train_script.main(["--config", CONFIG, *demo_overrides(miniature, run, *online(miniature), *more)])
        return RunFolder(run)

    whole = train(tmp_path / "whole")
    first = train(tmp_path / "run", "train.steps=6")
    assert all(line["loss_align"] > 0 for line in whole.metrics())
    names = ("loss", "loss_align", "cosine/mid")
    assert [[line[name] for name in names] for line in whole.metrics()] == [
        [line[name] for name in names] for line in first.metrics()
    ]


def test_while_lambda_is_0_the_teacher_is_not_asked(miniature, tmp_path, monkeypatch):
    asked = []
    forward = OnlineTeacher.forward
    monkeypatch.setattr(OnlineTeacher, "forward", lambda *args: asked.append(1) or forward(*args))
    monkeypatch.setattr(train_script, "self_test", lambda *_, **__: None)
    overrides = demo_overrides(miniature, tmp_path / "run", *online(miniature), "align.cutoff_step=2")
    train_script.main(["--config", CONFIG, *overrides])
    assert len(asked) == 2
    config = load_config(CONFIG, demo_overrides(miniature, tmp_path, *online(miniature), "align.coeff=0"))
    assert build_parts(config).online is None


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (["teacher.model=null"], "needs teacher.model"),
        (["teacher.dim=32"], "set teacher.dim=64"),
        (["teacher.decoder=nowhere"], "nowhere does not exist"),
        (["teacher.source=cached"], "'data.tokens' is missing"),
    ],
)
def test_what_is_missing_or_wrong_is_said(miniature, tmp_path, knobs, said):
    with pytest.raises(UserError, match=said):
        build_parts(load_config(CONFIG, demo_overrides(miniature, tmp_path, *online(miniature, *knobs))))


def test_a_tiny_decoder_is_loaded_and_another_model_refused(miniature, tmp_path):
    tiny().save_pretrained(tmp_path / "taesd")
    assert isinstance(load_decoder(str(tmp_path / "taesd")), AutoencoderTiny)
    with pytest.raises(UserError, match="is of the kind 'AutoencoderKL'; AutoencoderTiny was expected"):
        load_decoder(str(miniature / "models" / "sd15-mini" / "vae"))
    (tmp_path / "taesd" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot load teacher\.decoder"):
        load_decoder(str(tmp_path / "taesd"))


def test_the_plan_counts_the_teacher(miniature, tmp_path, capsys):
    """As often as decoder and encoder have operations; without its files it says that it does not."""
    knobs = demo_overrides(miniature, tmp_path / "run", *online(miniature))
    train_script.main(["--config", CONFIG, *knobs, "--plan"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "online teacher" in line)
    parts = build_parts(load_config(CONFIG, knobs))
    # Of a CPU's kernels of attention PyTorch 2.11 counts this one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        parts.online(torch.zeros(1, 4, 16, 16))
    assert f"{counter.get_total_flops() / 1e9:.4g} GFLOP an image more" in line
    train_script.main(["--config", CONFIG, *knobs, "teacher.model=none/such", "--plan"])
    assert "online teacher not counted" in " ".join(capsys.readouterr().out.split())
