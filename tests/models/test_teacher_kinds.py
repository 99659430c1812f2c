"""Every kind of teacher against transformers' own model and image processor, on small models with random weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import demo_overrides, run_numbered
from PIL import Image
from torch.nn import functional as F

from cache.reader import FieldReader
from common.errors import UserError
from configs.loading import load_config
from models.pipeline_parts import weights_digest
from models.teachers.table import TEACHERS, load_teacher
from training.parts import build_parts

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NATIVE, WIDTH = 4, 32
# A square of 4 patches does not fill its image, as in siglip2-so400m-patch14-384.
TOWER = SIZES | {"patch_size": 8, "image_size": 8 * NATIVE + 1}
WORDS = SIZES | {"vocab_size": 50}
SATELLITE = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
# Each kind: its config, the processor of its folder, its statistics, its patch and the tokens before those of the patches.
KINDS = {
    "dinov2": (
        lambda: transformers.Dinov2Config(**SIZES, patch_size=14, image_size=14 * NATIVE),
        (transformers.BitImageProcessor, {}, 14, 1),
    ),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**SIZES, patch_size=14, image_size=14 * NATIVE),
        (transformers.BitImageProcessor, SATELLITE, 14, 5),
    ),
    "dinov3": (
        lambda: transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=4),
        (transformers.DINOv3ViTImageProcessor, SATELLITE, 16, 5),
    ),
    "dinov3 without registers": (
        lambda: transformers.DINOv3ViTConfig(**SIZES, use_gated_mlp=True),
        (transformers.DINOv3ViTImageProcessor, {}, 16, 1),
    ),
    "siglip": (
        lambda: transformers.SiglipConfig(vision_config=TOWER, text_config=WORDS),
        (transformers.SiglipImageProcessor, {}, 8, 0),
    ),
    "siglip's vision tower": (
        lambda: transformers.SiglipVisionConfig(**TOWER),
        (transformers.SiglipImageProcessor, SATELLITE, 8, 0),
    ),
}  # fmt: skip
# Of a BitImageProcessor the class itself has CLIP's statistics; DINOv2's folders name ImageNet's.
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A folder of a kind, and what it is."""
    config, (processor, statistics, patch, prefix) = KINDS[request.param]
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor(**(IMAGENET if "dinov2" in request.param else {}) | statistics).save_pretrained(folder)
    return SimpleNamespace(name=request.param, folder=str(folder), patch=patch, prefix=prefix, model=model)


def pictures(size):
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]


def tensors(images):
    return torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def expected(kind, images):
    """All rows `(B, prefix + N, D)` by the library alone."""
    processor = transformers.AutoImageProcessor.from_pretrained(kind.folder)
    size = {"height": images[0].height, "width": images[0].width}
    sizes = (
        {"size": {"shortest_edge": size["height"]}, "crop_size": size}
        if "dinov2" in kind.name
        else {"size": size}
    )
    pixels = processor(images=images, return_tensors="pt", **sizes)["pixel_values"]
    model = transformers.AutoModel.from_pretrained(kind.folder)
    with torch.no_grad():
        if "siglip" in kind.name:
            tower = getattr(model, "vision_model", model)
            return tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        return model(pixels).last_hidden_state


@pytest.mark.parametrize("grid", [NATIVE, 3, 7])
class TestTokens:
    def test_they_are_the_librarys_own_of_the_folders_own_processor(self, kind, grid):
        teacher = load_teacher(kind.folder, grid)
        images = pictures(grid * kind.patch)
        rows = expected(kind, images)
        assert (teacher.size, teacher.patch, teacher.num_prefix) == (
            grid * kind.patch,
            kind.patch,
            kind.prefix,
        )
        tokens = teacher(tensors(images))
        assert tokens.shape == (2, grid**2, WIDTH)
        assert rows.shape == (2, kind.prefix + grid**2, WIDTH)
        torch.testing.assert_close(tokens, rows[:, kind.prefix :], rtol=1e-4, atol=1e-4)
        assert not tokens.requires_grad
        # They are normalised for the last time, but for the weights of the norm: all have one spread.
        names = ("layernorm", "norm", "post_layernorm")
        norm = next(getattr(teacher.model, name) for name in names if hasattr(teacher.model, name))
        plain = (tokens - norm.bias) / norm.weight
        torch.testing.assert_close(plain.std(-1, correction=0), torch.ones(2, grid**2), rtol=0, atol=1e-2)

    def test_other_statistics_are_told_apart(self, kind, grid):
        images = tensors(pictures(grid * kind.patch))
        teacher = load_teacher(kind.folder, grid)
        shifted = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
        other = type(teacher)(teacher.model, grid, statistics=shifted)
        assert (teacher(images) - other(images)).abs().max() > 0.1

    def test_blanking_one_patch_changes_that_token_alone(self, kind, grid):
        """Without attention no token sees another; the order is row by row."""
        teacher = load_teacher(kind.folder, grid)
        for name, parameter in teacher.model.named_parameters():
            if any(part in name for part in ("o_proj", "out_proj", "attention.output.dense")):
                parameter.zero_()
        images = tensors(pictures(grid * kind.patch))[:1]
        plain = teacher(images)
        for row, column in ((0, grid - 1), (1, 0), (grid - 1, 1)):
            blank = images.clone()
            top, left = row * kind.patch, column * kind.patch
            blank[..., top : top + kind.patch, left : left + kind.patch] = 0
            changed = (teacher(blank) - plain).abs().amax(-1)[0] > 1e-4
            assert changed.nonzero().flatten().tolist() == [row * grid + column]


def test_rows_that_are_not_the_grid_are_refused(kind):
    teacher = load_teacher(kind.folder, 3)
    images = tensors(pictures(teacher.size))
    for prefix in {0, kind.prefix - 1, kind.prefix + 1} - {kind.prefix, -1}:
        teacher.num_prefix = prefix
        with pytest.raises(ValueError, match="patch tokens"):
            teacher(images)
    teacher = load_teacher(kind.folder, 4)
    with pytest.raises(ValueError, match="expected images"):
        teacher(images)
    with pytest.raises(ValueError, match=r"must return \(B, 16, 32\) patch tokens, got \(2, 9, 32\)"):
        teacher.check_tokens(load_teacher(kind.folder, 3)(images))


def test_bf16_stays_close(kind):
    teacher = load_teacher(kind.folder, 5)
    images = tensors(pictures(teacher.size))
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher(images)
    assert F.cosine_similarity(half.float(), teacher(images), dim=-1).min() > 0.99


def test_the_resampling_of_the_positions_is_named(kind):
    native, other = (load_teacher(kind.folder, grid).resampling for grid in (NATIVE, 7))
    if "dinov3" in kind.name:
        assert native == other == "none (rotary positions)"
    else:
        assert native == "none (native grid)"
        assert other == f"bicubic, antialias={'registers' in kind.name}"


@pytest.mark.parametrize("kind", ["siglip"], indirect=True)
def test_the_vision_tower_is_the_same_alone_and_beside_the_text_tower(kind, tmp_path):
    kind.model.vision_model.save_pretrained(tmp_path)
    both, alone = load_teacher(kind.folder, 5), load_teacher(str(tmp_path), 5)
    images = tensors(pictures(both.size))
    assert both(images).equal(alone(images))
    assert weights_digest(both.model) == weights_digest(alone.model)
    names = dict(both.model.named_parameters())
    assert not any("head" in name or "text" in name for name in names)


class TestStatistics:
    @pytest.fixture
    def folder(self, kind, tmp_path):
        """A copy of the folder, to change."""
        kind.model.save_pretrained(tmp_path)
        return tmp_path

    def test_without_a_processor_they_are_the_published_ones(self, kind, folder):
        teacher = load_teacher(str(folder), 3)
        published = HALF if "siglip" in kind.name else IMAGENET
        for values, key in ((teacher.mean, "image_mean"), (teacher.std, "image_std")):
            assert values.flatten().tolist() == pytest.approx(published[key])
        origin = {} if "dinov2" in kind.name else {"normalisation_from": "published"}
        assert origin.items() <= teacher.normalisation.items()
        assert bool(origin) == bool(teacher.normalisation)

    @pytest.mark.parametrize(
        "content",
        [
            {"image_mean": [0.5] * 3},
            {"image_mean": [0.5] * 2, "image_std": [0.5] * 3},
            {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]},
            {"image_mean": "x", "image_std": [0.5] * 3},
            IMAGENET | {"do_normalize": False},
            [],
        ],
    )
    def test_a_processor_that_says_none_is_refused(self, folder, content):
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"preprocessor_config\.json") as error:
            load_teacher(str(folder), 3)
        assert "\n" not in str(error.value)


def script_3(miniature, folder, out, *more):
    options = [
        "--csv",
        miniature / "val.csv",
        "--teacher",
        folder,
        "--out",
        out,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    run_numbered("3_build_dino_cache", *options, *more)
    return FieldReader(out, "tokens")


def test_a_cache_says_what_made_it(kind, miniature, tmp_path):
    reader = script_3(miniature, kind.folder, tmp_path / "tokens", "--grid", 3)
    spec, teacher = reader.spec, load_teacher(kind.folder, 3)
    name = {"dinov2": "DINOv2", "dinov3": "DINOv3", "siglip": "SigLIP"}[kind.name.split("'")[0].split()[0]]
    assert spec.meaning == f"L2-normalised {name} patch tokens after the final LayerNorm, row by row"
    assert spec.view == {"kind": "aligned", "size": 3 * kind.patch, "patch": kind.patch, "grid": 3}
    assert spec.source["implementation"] == f"transformers.{type(teacher.model).__name__}"
    statistics = KINDS[kind.name][1][1]
    if "dinov2" in kind.name and not statistics:
        assert "normalisation" not in spec.source
    else:
        facts = statistics or (HALF if "siglip" in kind.name else IMAGENET)
        mean, std = (tuple(facts[key]) for key in ("image_mean", "image_std"))
        assert spec.source["normalisation"] == f"mean {mean}, std {std}"
        assert spec.source["normalisation_from"] == "preprocessor_config.json"
    kind.model.save_pretrained(tmp_path / "plain")  # without its processor
    plain = script_3(miniature, tmp_path / "plain", tmp_path / "other", "--grid", 3).spec
    assert plain.agrees_with(spec) == (not statistics)


@pytest.mark.parametrize("kind", ["dinov3", "siglip"], indirect=True)
def test_dinov2s_own_view_is_not_for_others(kind, miniature, tmp_path):
    with pytest.raises(UserError, match="--view official is DINOv2's transform"):
        script_3(miniature, kind.folder, tmp_path / "tokens", "--view", "official")


def test_it_teaches_online(kind, miniature, tmp_path):
    knobs = [
        "teacher.source=online",
        f"teacher.model={kind.folder}",
        f"teacher.dim={WIDTH}",
        "data.tokens=null",
    ]
    parts = build_parts(load_config("configs/demo.yaml", demo_overrides(miniature, tmp_path / "run", *knobs)))
    tokens = parts.online(torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (2, parts.config.teacher.grid**2, WIDTH)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:2]))
    counted = parts.online.to("meta")(torch.empty(1, 4, 16, 16, device="meta"))  # as the plan counts it
    assert counted.shape == tokens[:1].shape


@pytest.mark.parametrize(
    "model_type",
    [
        "bert",
        "clip_text_model",
        "siglip_text_model",
        "siglip2",
        "dinov3_convnext",
        None,
        3,
        ["dinov2"],
        {"a": 1},
    ],
)
def test_another_model_is_one_line_that_lists_the_kinds(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        load_teacher(str(tmp_path), 4)
    assert f"is a {model_type!s:.60} model" in str(error.value)
    for kind in TEACHERS:
        assert f"{kind.name}: {', '.join(kind.model_types)}" in str(error.value)
    assert "\n" not in str(error.value)
