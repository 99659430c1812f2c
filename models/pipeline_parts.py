"""Load the parts of a diffusers pipeline folder (or hub id), with errors that say what to do."""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from common.errors import UserError
from common.pretrained import check_files, foreign_files, load_pretrained, local_folder, read_config

# Settings of eval.sampler, and how all of them space their steps.
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
# Those of flow matching.
FLOW_SAMPLERS = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
SPACING = "trailing"  # ends at the noisiest step, which sampling in few steps needs


def load_part(
    base: str, part: str, kind: type, revision: str | None = None, *,
    dtype: torch.dtype = torch.float32, **options,
):  # fmt: skip
    """Load one part of a pipeline, of the class `kind`, in the layout that `save_pretrained` writes; networks in `dtype`.

    `base` is a hub id or a local folder, `options` are further ones of from_pretrained. Raises `UserError` when `base` is
    neither, or holds no such part. In bf16 no weight is ever in memory in fp32, but for those that the file has so, one by one.
    """
    if dtype != torch.float32:
        options["torch_dtype"] = dtype
    loaded = load_pretrained(kind, base, f"{part} of {base}", part=part, revision=revision, **options)
    if not isinstance(loaded, torch.nn.Module):
        return loaded
    with kept_exact(loaded):
        return torch.nn.Module.to(loaded, dtype)  # diffusers' own refuses quantised networks


def exact_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and buffers that the network's class in diffusers keeps in fp32 whatever its precision, by name."""
    parts = getattr(network, "_keep_in_fp32_modules", None) or ()
    named = (*network.named_parameters(), *network.named_buffers()) if parts else ()
    return {name: x for name, x in named if any(part in name.split(".") for part in parts)}


@contextmanager
def kept_exact(network: torch.nn.Module) -> Iterator[None]:
    """Let a conversion inside this block leave `exact_weights` in fp32."""
    exact = [(x, x.data.float()) for x in exact_weights(network).values()]
    yield
    for x, values in exact:
        x.data = values.to(x.device)


def shapes_of_part(
    base: str, part: str, kind: type, revision: str | None = None, *, local: bool = False
) -> torch.nn.Module:
    """One network on the device "meta", from its config alone; raises `UserError` where there is none (`local`: here)."""
    what = f"{part} of {base}"
    config = read_config(base, kind.config_name, what, part=part, revision=revision, local=local)
    with foreign_files(what), torch.device("meta"):
        return kind.from_config(config)


def load_pipeline_class(base: str, revision: str | None = None) -> str:
    """The class of the pipeline that a folder or hub id holds, from its model_index.json; raises `UserError` without one."""
    found = read_config(base, "model_index.json", f"pipeline {base}", revision=revision).get("_class_name")
    if not isinstance(found, str):
        raise UserError(f"{base}/model_index.json names no _class_name: give a pipeline folder of diffusers")
    return found


@functools.lru_cache
def files_digest(base: str, part: str, revision: str | None = None) -> str:
    """What says that a part's files are the same as before: sha256 of the weights of a local folder, a hub's commit.

    Of a local folder the safetensors that `load_part` reads count. Read once in a process.
    """
    if local_folder(base) is None:
        found = try_to_load_from_cache(base, "scheduler/scheduler_config.json", revision=revision or "main")
        return Path(found).parents[1].name if isinstance(found, str) else str(revision)
    check_files(folder := Path(base) / part, network=True)
    files, digest = sorted(folder.glob("*.safetensors")), hashlib.sha256()
    for file in (file for file in files if "." not in file.name.split(".", 1)[1]):  # no .fp16., no .non_ema.
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over shapes and bytes of all weights: the model's identity, however it was stored.

    Without their names and in no order, because a class's names in memory change with the version of its library
    (transformers 5.17 and 5.23 differ in DINOv2's attention).
    """
    digests = []
    for tensor in module.state_dict().values():
        if is_traceable_wrapper_subclass(tensor):  # quantised: its integers and scales say the same
            tensor = tensor.dequantize()
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(f"{tuple(tensor.shape)}".encode() + data).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
