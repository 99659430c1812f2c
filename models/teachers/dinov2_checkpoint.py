"""Load checkpoint files in the format of facebookresearch/dinov2 into the transformers class that computes the same.

    model = load_checkpoint("dinov2_vitl14_reg4_pretrain.pth")   # a Dinov2WithRegistersModel in fp32

Names and shapes are those of `dinov2/models/vision_transformer.py` and `dinov2/layers/` in that repository. Every key of a
file is either loaded, or skipped because it belongs to a projection head of the training, or reported as an error.
"""

import math
import pickle
import re
import struct
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError

MAGIC = (b"PK", b"\x80")  # first bytes of a zip archive, and of a pickle, which torch.save wrote before 1.6
DAMAGED = (  # torch.load raises these for a file cut off at different places
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, struct.error),
    *(ValueError, LookupError, AttributeError, TypeError),
)
# These keys are tried in this order, because a file may hold a student beside the teacher.
WRAPPERS = ("teacher", "model", "state_dict")
HEADS = ("dino_head.", "ibot_head.")
HEAD_DIM = 64  # width of an attention head in all four published sizes; no tensor's shape shows it
# FSDP stores blocks in chunks, as `blocks.C.I`. Each chunk is padded with Identity in front, so that I numbers all blocks.
CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
BLOCK = re.compile(r"^blocks\.(\d{1,3})\.")
# The names of the same weights in files of transformers. `from_pretrained` maps them to the names that its version uses.
RENAMED = {
    r"^(cls_token|mask_token|register_tokens)$": r"embeddings.\1",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.ls([12])\.gamma$": r".layer_scale\1.lambda1",
    r"\.mlp\.w12\.": ".mlp.weights_in.",
    r"\.mlp\.w3\.": ".mlp.weights_out.",
    r"^norm\.": "layernorm.",
}


def load_checkpoint(path: str | Path) -> nn.Module:
    """Load the model of a file in fp32: `Dinov2WithRegistersModel` if it has registers, else `Dinov2Model`.

    Raises `UserError` when the file is no checkpoint, is incomplete, or is of another architecture.
    """
    state = read_backbone(path)
    config = infer_config(state, path)
    # The mask token is needed only in training, which masks patches.
    state.setdefault("mask_token", torch.zeros(1, config.hidden_size))
    check_complete(state, shapes_of(config), path)
    model_class = transformers.MODEL_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=to_transformers(state), dtype=torch.float32, output_loading_info=True
    )
    if left := {what: keys for what, keys in report.items() if keys}:
        raise RuntimeError(f"transformers {transformers.__version__} did not take all of {path}: {left}")
    return model


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """Read a backbone, and rename its weights as in the published files (`blocks.0.norm1.weight`).

    Of a file that holds a teacher and a student, the teacher is read.
    """
    state = read_file(path)
    while isinstance(state, dict) and (inside := [w for w in WRAPPERS if isinstance(state.get(w), dict)]):
        state = state[inside[0]]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no state dict but a {type(state).__name__}: save model.state_dict()")
    if teacher := [key for key in state if key.startswith("teacher.")]:
        state = {key.removeprefix("teacher."): state[key] for key in teacher}
    elif any(key.split(".")[0] == "student" for key in state):
        raise UserError(f"{path} holds a student but no teacher: give the checkpoint of the teacher")
    backbone = {}
    for key, value in state.items():
        if key.startswith(HEADS):
            continue
        name = CHUNK.sub(r"blocks.\1.", key.removeprefix("backbone."))
        if name in backbone:
            raise UserError(f"{path} has {name} twice: give a file with one backbone")
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {key} is a {type(value).__name__}, not a tensor: save model.state_dict() alone"
            )
        backbone[name] = value
    return backbone


def read_file(path: str | Path) -> object:
    """Read a file with safetensors or `torch.load`, without running any code that it may contain."""
    path = Path(path)
    again = "download it again, or give another file"
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file ({error}): {again}") from None
    if not start.startswith(MAGIC):
        raise UserError(f"{path} is no checkpoint (it begins with {start!r}): {again}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise UserError(
                f"{path} holds more than tensors, which could run code when loaded: save model.state_dict() alone"
            ) from None
        raise UserError(f"{path} is damaged or cut off: {again}") from None


def infer_config(state: dict[str, Tensor], path: str | Path) -> transformers.PretrainedConfig:
    """Infer the architecture from the shapes of a backbone's weights; `path` is used only in messages."""

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in state:
            raise UserError(
                f"{path} has no {key}, so it is no DINOv2 of facebookresearch/dinov2 (of Hugging Face weights give the folder)"
            )
        found = tuple(state[key].shape)
        if len(found) != ndim or 0 in found:
            raise UserError(f"{path}: {key} has shape {found}, not {ndim} dimensions: give another file")
        return found

    width, _, patch, _ = shape("patch_embed.proj.weight", 4)
    positions = shape("pos_embed", 3)[1] - 1
    side = math.isqrt(max(positions, 0))
    if side == 0 or side**2 != positions:
        raise UserError(
            f"{path}: pos_embed has {positions + 1} positions, which are not CLS and a square: give a DINOv2 checkpoint"
        )
    if width % HEAD_DIM:
        raise UserError(
            f"{path}: the width {width} is no multiple of {HEAD_DIM}, the width of DINOv2's heads: give a DINOv2 checkpoint"
        )
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = shape("blocks.0.mlp.w3.weight", 2)[1] if swiglu else shape("blocks.0.mlp.fc1.weight", 2)[0]
    ratio = max(1, round(hidden * (1.5 if swiglu else 1) / width))
    if hidden != hidden_width(width, ratio, swiglu):
        raise UserError(
            f"{path}: the MLP is {hidden} wide, which no whole multiple of the width {width} gives: give a DINOv2 checkpoint"
        )
    registers = {"num_register_tokens": shape("register_tokens", 3)[1]} if "register_tokens" in state else {}
    return transformers.AutoConfig.for_model(
        "dinov2_with_registers" if registers else "dinov2",
        hidden_size=width,
        num_hidden_layers=1 + max(int(match[1]) for key in state if (match := BLOCK.match(key))),
        num_attention_heads=width // HEAD_DIM,
        mlp_ratio=ratio,
        patch_size=patch,
        image_size=side * patch,
        use_swiglu_ffn=swiglu,
        **registers,
    )


def hidden_width(width: int, ratio: int, swiglu: bool) -> int:
    """Return the hidden width of an MLP; a SwiGLU has two thirds of it, rounded up to a multiple of 8 (`SwiGLUFFNFused`)."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio


def shapes_of(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights of such a backbone, by their names in the original code."""
    width, patch = config.hidden_size, config.patch_size
    hidden = hidden_width(width, config.mlp_ratio, config.use_swiglu_ffn)
    shapes = {
        "cls_token": (1, 1, width),
        "mask_token": (1, width),
        "pos_embed": (1, 1 + (config.image_size // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    if registers := getattr(config, "num_register_tokens", 0):
        shapes["register_tokens"] = (1, registers, width)
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if config.use_swiglu_ffn:
        linear |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
    else:
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    block = {f"ls{i}.gamma": (width,) for i in (1, 2)}
    block |= {f"norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    for name, (rows, columns) in linear.items():
        block |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def check_complete(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: str | Path) -> None:
    """Raise `UserError` unless the state has exactly these keys, each with a floating-point tensor of the given shape."""
    if unknown := sorted(state.keys() - shapes.keys()):
        raise UserError(f"{path} has {unknown[0]}, which is no part of such a DINOv2: give another file")
    if missing := [key for key in shapes if key not in state]:
        raise UserError(f"{path} lacks {missing[0]}: it is not complete, or no DINOv2; give another file")
    for key, shape in shapes.items():
        if state[key].shape != shape or not state[key].is_floating_point():
            found = f"{state[key].dtype} {tuple(state[key].shape)}"
            raise UserError(f"{path}: {key} is {found}, {shape} was expected: give another file")


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights as in a folder of transformers, and split each `qkv` into query, key and value."""
    renamed = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            kind = key.rsplit(".", 1)[1]
            block = BLOCK.match(key)[1]
            for name, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{block}.attention.attention.{name}.{kind}"] = third
            continue
        for pattern, replacement in RENAMED.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed
