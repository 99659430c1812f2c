"""Checkpoint files of facebookresearch/dinov2 as teachers, against a forward written here on the file's own keys."""

import math
import re

import pytest
import torch
from conftest import run_numbered
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from cache.reader import FieldReader
from common.errors import UserError
from common.sides import height_width
from models.pipeline_parts import weights_digest
from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from models.teachers.dinov2_checkpoint import infer_config, load_checkpoint, shapes_of
from models.teachers.table import load_teacher

WIDTH, DEPTH, PATCH, GRID = 128, 2, 14, 4
KINDS = [(swiglu, registers) for swiglu in (False, True) for registers in (0, 4)]


def original(swiglu=False, registers=0, width=WIDTH, depth=DEPTH, grid=GRID):
    """Keys and shapes of a checkpoint as facebookresearch/dinov2 publishes it, written down from its modules."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    hidden = 8 * math.ceil(int(4 * width * 2 / 3) / 8) if swiglu else 4 * width
    first, second = ("w12", "w3") if swiglu else ("fc1", "fc2")
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            (f"mlp.{first}", hidden * (2 if swiglu else 1), width),
            (f"mlp.{second}", width, hidden),
        ):
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (rows, columns), (rows,)
        for norm in (1, 2):
            shapes[f"blocks.{i}.norm{norm}.weight"] = shapes[f"blocks.{i}.norm{norm}.bias"] = (width,)
            shapes[f"blocks.{i}.ls{norm}.gamma"] = (width,)
    return shapes


def checkpoint(seed=0, **kind):
    """Random weights; matrices shrink with their width, so that no softmax saturates."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / (shape[1] ** 0.5 if len(shape) == 2 else 1)
        for key, shape in original(**kind).items()
    }


def forward(w, images):
    """All normalised rows `(B, 1 + registers + N, D)` of a facebookresearch ViT, on its raw keys and native grid."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = F.conv2d(
        (images - mean) / std, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH
    )
    batch, width = x.shape[:2]
    cls = w["cls_token"].expand(batch, 1, width)
    x = torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    if "register_tokens" in w:
        x = torch.cat([x[:, :1], w["register_tokens"].expand(batch, -1, -1), x[:, 1:]], dim=1)
    depth = sum(key.endswith("ls1.gamma") for key in w)
    for i in range(depth):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items()}

        def linear(x, name, block=block):
            return x @ block[f"{name}.weight"].T + block[f"{name}.bias"]

        h = F.layer_norm(x, (width,), block["norm1.weight"], block["norm1.bias"], eps=1e-6)
        qkv = linear(h, "attn.qkv").reshape(batch, -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 64**-0.5, qkv[1], qkv[2]  # (B, heads, rows, 64)
        h = ((q @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, -1, width)
        x = x + linear(h, "attn.proj") * block["ls1.gamma"]
        h = F.layer_norm(x, (width,), block["norm2.weight"], block["norm2.bias"], eps=1e-6)
        if "mlp.w12.weight" in block:
            gate, value = linear(h, "mlp.w12").chunk(2, dim=-1)
            h = linear(F.silu(gate) * value, "mlp.w3")
        else:
            h = linear(F.gelu(linear(h, "mlp.fc1")), "mlp.fc2")
        x = x + h * block["ls2.gamma"]
    return F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], eps=1e-6)


def images(grid=GRID):
    return torch.rand(2, 3, PATCH * grid, PATCH * grid, generator=torch.Generator().manual_seed(9))


def tokens_of(path):
    return load_teacher(str(path), GRID)(images())


def saved(path, content):
    torch.save(content, path)
    return path


def huggingface(folder, swiglu=False, registers=0):
    """A folder of the class that transformers itself chooses, with random weights."""
    config = AutoConfig.for_model(
        "dinov2_with_registers" if registers else "dinov2",
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        patch_size=PATCH,
        image_size=PATCH * GRID,
        use_swiglu_ffn=swiglu,
        **({"num_register_tokens": registers} if registers else {}),
    )
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def published(folder):
    """The weights of such a folder under the keys of facebookresearch/dinov2."""
    w = load_file(folder / "model.safetensors")
    weights = {name: w.pop(f"embeddings.{name}") for name in ("cls_token", "mask_token")}
    weights["pos_embed"] = w.pop("embeddings.position_embeddings")
    if "embeddings.register_tokens" in w:
        weights["register_tokens"] = w.pop("embeddings.register_tokens")
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = w.pop(f"embeddings.patch_embeddings.projection.{kind}")
        weights[f"norm.{kind}"] = w.pop(f"layernorm.{kind}")
        for i in range(DEPTH):
            attention = f"encoder.layer.{i}.attention"
            qkv = [w.pop(f"{attention}.attention.{name}.{kind}") for name in ("query", "key", "value")]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            weights[f"blocks.{i}.attn.proj.{kind}"] = w.pop(f"{attention}.output.dense.{kind}")
    spelled = {"weights_in": "w12", "weights_out": "w3", "layer_scale": "ls", "lambda1": "gamma"}
    for key in w:
        name = key.replace("encoder.layer.", "blocks.")
        for theirs, ours in spelled.items():
            name = name.replace(theirs, ours)
        weights[name] = w[key]
    return weights


@pytest.mark.parametrize(("swiglu", "registers"), KINDS)
class TestTheFileIsTheModel:
    def test_tokens_are_those_of_the_original_forward(self, tmp_path, swiglu, registers):
        weights = checkpoint(swiglu=swiglu, registers=registers)
        tokens = tokens_of(saved(tmp_path / "dinov2.pth", weights))
        rows = forward(weights, images())
        assert rows.shape == (2, 1 + registers + GRID**2, WIDTH)
        assert tokens.shape == (2, GRID**2, WIDTH)
        torch.testing.assert_close(tokens, rows[:, 1 + registers :], rtol=1e-4, atol=1e-4)

    def test_neither_cls_nor_registers_are_among_the_tokens(self, tmp_path, swiglu, registers):
        weights = checkpoint(swiglu=swiglu, registers=registers)
        tokens = tokens_of(saved(tmp_path / "dinov2.pth", weights))
        prefix = forward(weights, images())[:, : 1 + registers]
        assert torch.cdist(tokens, prefix).min() > 1

    def test_a_folder_and_a_file_of_the_same_weights_have_one_digest(self, tmp_path, swiglu, registers):
        folder = load_teacher(huggingface(tmp_path / "folder", swiglu, registers), GRID)
        weights = published(tmp_path / "folder")
        assert weights.keys() == original(swiglu, registers).keys()
        file = load_teacher(str(saved(tmp_path / "dinov2.pth", weights)), GRID)
        weights["blocks.1.attn.qkv.bias"][0] += 1e-3
        other = load_teacher(str(saved(tmp_path / "other.pth", weights)), GRID)
        assert weights_digest(file.model) == weights_digest(folder.model) != weights_digest(other.model)
        assert type(file.model) is type(folder.model)
        assert file(images()).equal(folder(images()))
        assert (file.format, folder.format) == ("facebookresearch", "huggingface")


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def chunked(weights):
    """`blocks.I` as `blocks.C.I` with two blocks in a chunk: each list is padded with Identity up to its first block."""
    return {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): weights[key]
        for key in weights
    }


HEAD = {"dino_head.mlp.0.weight": torch.ones(3, 3), "ibot_head.last_layer.weight_v": torch.ones(2)}
LAYOUTS = {
    "nested": lambda own, other: {"teacher": under("backbone.", own) | HEAD},
    "nested beside the student": lambda own, other: {
        "student": under("backbone.", other),
        "teacher": under("backbone.", own) | HEAD,
        "iteration": 3,
    },
    "bare teacher": lambda own, other: {"teacher": own},
    "flat": lambda own, other: (
        under("student.backbone.", other) | under("teacher.backbone.", own) | under("teacher.", HEAD)
    ),
    "flat in model": lambda own, other: {
        "model": under("student.backbone.", other) | under("teacher.backbone.", own),
        "optimizer": {},
    },
    "model": lambda own, other: {"model": own},
    "state_dict": lambda own, other: {"state_dict": under("backbone.", own)},
    "chunked": lambda own, other: chunked(own),
    "chunked in teacher": lambda own, other: {"teacher": under("backbone.", chunked(own)) | HEAD},
    "without a mask token": lambda own, other: {key: own[key] for key in own if key != "mask_token"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_teachers_tokens(tmp_path, layout):
    own, other = (checkpoint(seed, registers=4, depth=3) for seed in (0, 1))
    plain = tokens_of(saved(tmp_path / "plain.pth", own))
    assert not plain.equal(tokens_of(saved(tmp_path / "other.pth", other)))
    assert tokens_of(saved(tmp_path / "layout.pt", LAYOUTS[layout](own, other))).equal(plain)


def test_safetensors_give_the_same_tokens(tmp_path):
    weights = checkpoint(swiglu=True)
    plain = tokens_of(saved(tmp_path / "plain.pth", weights))
    for name, content in (("plain", weights), ("flat", under("teacher.backbone.", weights))):
        save_file(content, tmp_path / f"{name}.safetensors")
        assert tokens_of(tmp_path / f"{name}.safetensors").equal(plain)


def test_half_precision_is_read_as_the_fp32_of_the_same_numbers(tmp_path):
    half = {key: value.half() for key, value in checkpoint().items()}
    tokens = tokens_of(saved(tmp_path / "half.pth", half))
    assert tokens.dtype == torch.float32
    assert tokens.equal(tokens_of(saved(tmp_path / "full.pth", {key: half[key].float() for key in half})))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    ("width", "depth", "heads", "swiglu", "millions"),
    [
        (384, 12, 6, False, 22.06),
        (768, 12, 12, False, 86.58),
        (1024, 24, 16, False, 304.37),
        (1536, 40, 24, True, 1136.48),
    ],
    ids=["S", "B", "L", "g"],
)
def test_the_published_sizes_are_recognised(width, depth, heads, swiglu, millions, registers):
    shapes = original(swiglu, registers, width, depth, grid=37)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = infer_config(state, "dinov2.pth")
    assert shapes_of(config) == shapes
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, depth, heads)
    assert (config.patch_size, config.image_size, config.mlp_ratio, config.use_swiglu_ffn) == (
        14,
        518,
        4,
        swiglu,
    )
    assert getattr(config, "num_register_tokens", 0) == registers
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    extra = (registers * width) / 1e6
    assert model.num_parameters() / 1e6 == pytest.approx(millions + extra, abs=0.006)
    assert model.num_parameters() == sum(value.numel() for value in state.values())


def without(*keys, **kind):
    return {key: value for key, value in checkpoint(**kind).items() if key not in keys}


BROKEN = {
    "a missing key": (lambda: without("blocks.1.attn.qkv.bias"), "lacks blocks.1.attn.qkv.bias"),
    "no layer scale": (lambda: without("blocks.0.ls1.gamma"), "lacks blocks.0.ls1.gamma"),
    "a missing block": (
        lambda: {key: value for key, value in checkpoint(depth=3).items() if "blocks.1." not in key},
        "lacks blocks.1.",
    ),
    "an unknown key": (
        lambda: checkpoint() | {"head.weight": torch.ones(2)},
        "has head.weight, which is no part",
    ),
    "an unknown key beside the backbone": (
        lambda: {"teacher": under("backbone.", checkpoint()) | {"neck.bias": torch.ones(2)}},
        "has neck.bias, which is no part",
    ),
    "another shape": (
        lambda: checkpoint() | {"norm.bias": torch.ones(3)},
        "norm.bias is torch.float32 (3,), (128,)",
    ),
    "no floats": (
        lambda: checkpoint() | {"norm.bias": torch.ones(WIDTH, dtype=torch.int8)},
        "norm.bias is torch.int8 (128,), (128,)",
    ),
    "another rank": (
        lambda: checkpoint() | {"pos_embed": torch.ones(17, 128)},
        "has shape (17, 128), not 3 dimensions",
    ),
    "no tensor": (lambda: checkpoint() | {"epoch": 3}, "epoch is a int, not a tensor"),
    "a student alone": (lambda: under("student.backbone.", checkpoint()), "a student but no teacher"),
    "a nested student alone": (lambda: {"student": checkpoint()}, "a student but no teacher"),
    "two backbones": (
        lambda: under("backbone.", checkpoint()) | checkpoint(),
        "twice: give a file with one backbone",
    ),
    "no state dict": (lambda: [torch.ones(2)], "holds no state dict but a list"),
    "numbered keys": (lambda: {0: torch.ones(2)}, "holds no state dict but a dict"),
    "nothing": (dict, "has no patch_embed.proj.weight, so it is no DINOv2"),
    "DINOv3": (
        lambda: (
            without("pos_embed")
            | {"rope_embed.periods": torch.ones(16), "storage_tokens": torch.ones(1, 4, WIDTH)}
        ),
        "has no pos_embed, so it is no DINOv2",
    ),
    "CLIP": (
        lambda: {"visual.conv1.weight": torch.ones(8, 3, 14, 14)},
        "of Hugging Face weights give the folder",
    ),
    "timm with registers": (
        lambda: (
            without("pos_embed")
            | {"pos_embed": torch.ones(1, GRID**2, WIDTH), "reg_token": torch.ones(1, 4, WIDTH)}
        ),
        "has 16 positions, which are not CLS and a square",
    ),
    "a packed SwiGLU of timm": (
        lambda: without("blocks.0.mlp.fc1.weight") | {"blocks.0.mlp.fc1.weight": torch.ones(2 * 344, WIDTH)},
        "the MLP is 688 wide",
    ),
    "a SwiGLU of another rule": (
        lambda: checkpoint(swiglu=True) | {"blocks.0.mlp.w3.weight": torch.ones(WIDTH, 342)},
        "the MLP is 342 wide",
    ),
    "another width": (lambda: checkpoint(width=96), "the width 96 is no multiple of 64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_another_content_is_one_line_that_names_the_key(tmp_path, case):
    content, message = BROKEN[case]
    refused(saved(tmp_path / "dinov2.pth", content()), message)


def refused(path, message, **options):
    with pytest.raises(UserError) as error:
        load_teacher(str(path), GRID, **options)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Thing:
    """Pickled beside tensors, it is code to run."""


class TestFilesThatAreNoCheckpoint:
    @pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs", b""])
    def test_a_web_page(self, tmp_path, content):
        (tmp_path / "dinov2.pth").write_bytes(content)
        refused(tmp_path / "dinov2.pth", f"is no checkpoint (it begins with {content[:16]!r})")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_half_a_download(self, tmp_path, zipped):
        path = tmp_path / "dinov2.pth"
        torch.save(checkpoint(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for size in (*range(2, 600, 7), len(whole) // 100, len(whole) // 3, len(whole) - 5):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match=r"is damaged or cut off|holds more than tensors"):
                load_checkpoint(path)  # the latter where the cut is within the name of a class

    def test_objects(self, tmp_path):
        path = saved(tmp_path / "dinov2.pth", {"teacher": checkpoint(), "args": Thing()})
        refused(path, "holds more than tensors")

    def test_safetensors_that_are_none(self, tmp_path):
        (tmp_path / "dinov2.safetensors").write_bytes(b"<!DOCTYPE html>\n<html>")
        refused(tmp_path / "dinov2.safetensors", "is no safetensors file")

    def test_no_file(self):
        refused("weights/dinov2_vitl14_pretrain.pth", "does not exist: check the path")

    def test_a_revision_of_a_file(self, tmp_path):
        refused(saved(tmp_path / "dinov2.pth", checkpoint()), "has no revision", revision="main")


class TestPositions:
    """transformers resamples by size, one class with antialiasing and one without; the original code by a scale factor."""

    @staticmethod
    def resampled(encoder, antialias):
        native = (
            encoder.model.embeddings.position_embeddings[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
        )
        resized = F.interpolate(
            native, size=height_width(encoder.grid), mode="bicubic", align_corners=False, antialias=antialias
        )
        return resized.flatten(2).transpose(1, 2)  # (1, N, D)

    @pytest.mark.parametrize("grid", [3, 7, (3, 7)])
    @pytest.mark.parametrize(("registers", "antialias"), [(0, False), (4, True)])
    def test_what_is_reported_is_what_the_class_does(self, tmp_path, grid, registers, antialias):
        path = saved(tmp_path / "dinov2.pth", checkpoint(registers=registers))
        encoder = load_teacher(str(path), grid)
        assert encoder.resampling == f"bicubic, antialias={antialias}"
        seen = []  # what the embeddings add to the patches, measured in the forward itself
        encoder.model.embeddings.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        height, width = height_width(grid)
        assert (
            encoder(images(max(height, width))[:, :, : height * PATCH, : width * PATCH]).shape[1]
            == height * width
        )
        (pixels, out) = seen[0]
        patches = encoder.model.embeddings.patch_embeddings(pixels)
        added = out[:, 1 + registers :] - patches
        torch.testing.assert_close(
            added, self.resampled(encoder, antialias).expand_as(added), rtol=0, atol=1e-4
        )
        assert (added - self.resampled(encoder, not antialias)).abs().max() > 0.1

    @pytest.mark.parametrize("registers", [0, 4])
    def test_the_native_grid_needs_none(self, tmp_path, registers):
        encoder = load_teacher(huggingface(tmp_path, registers=registers), GRID)
        assert encoder.resampling == "none (native grid)"
        assert encoder.implementation == f"transformers.{type(encoder.model).__name__}"

    def test_another_rule_is_not_mistaken_for_a_known_one(self, tmp_path, monkeypatch):
        encoder = load_teacher(str(saved(tmp_path / "dinov2.pth", checkpoint())), 3)
        embeddings = encoder.model.embeddings
        native = embeddings.position_embeddings[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
        scaled = F.interpolate(
            native, scale_factor=(3.1 / GRID, 3.1 / GRID), mode="bicubic"
        )  # the original's offset
        rows = torch.cat([embeddings.position_embeddings[:, :1], scaled.flatten(2).transpose(1, 2)], dim=1)
        monkeypatch.setattr(embeddings, "interpolate_pos_encoding", lambda *_: rows)
        assert encoder.resampling == "unrecognised"


def test_caches_of_a_folder_and_of_a_file_agree_and_say_where_they_are_from(miniature, tmp_path):
    load_checkpoint(saved(tmp_path / "dinov2.pth", checkpoint(registers=4))).save_pretrained(tmp_path / "hf")
    specs = {}
    for name, teacher, size in (
        ("file", "dinov2.pth", ["--grid", 3]),
        ("folder", "hf", ["--image-size", 42]),
    ):
        run_numbered(
            "3_build_dino_cache",
            *[
                "--csv",
                miniature / "val.csv",
                "--teacher",
                tmp_path / teacher,
                "--out",
                tmp_path / name,
                *size,
            ],
            *["--workers", 0, "--device", "cpu"],
        )
        specs[name] = FieldReader(tmp_path / name, "tokens").spec
    assert specs["file"].agrees_with(specs["folder"])
    for name, format in (("file", "facebookresearch"), ("folder", "huggingface")):
        source = specs[name].source
        assert (source["format"], source["position_embeddings"]) == (format, "bicubic, antialias=True")
        assert source["implementation"] == "transformers.Dinov2WithRegistersModel"


def test_the_digest_knows_weights_by_value_and_not_by_name():
    """transformers renames modules from version to version."""
    one = torch.nn.ModuleDict({"query": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(2)})
    renamed = torch.nn.ModuleDict({"a_norm": one["norm"], "q_proj": one["query"]})
    assert weights_digest(one) == weights_digest(renamed)
    before = weights_digest(one)
    one["query"].weight.data[0, 0] += 1
    assert weights_digest(one) != before
    flat = torch.nn.ParameterList([torch.nn.Parameter(torch.arange(6.0))])
    square = torch.nn.ParameterList([torch.nn.Parameter(torch.arange(6.0).view(2, 3))])
    assert weights_digest(flat) != weights_digest(square)
