"""Load the parts of a diffusers pipeline folder (or hub id), with errors that say what to do."""

import functools
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from common.errors import UserError

REMOVED, MAINTAINED = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"

# Settings of eval.sampler, and how all of them space their steps.
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
SPACING = "trailing"  # ends at the noisiest step, which sampling in few steps needs

# diffusers' load_config uses an old option of huggingface_hub, which warns of it.
quietly = functools.partial(warnings.catch_warnings, action="ignore", category=UserWarning)


def load_part(base: str, part: str, kind: type, revision: str | None = None):
    """Load one part of a pipeline, of the class `kind`, in the layout that `save_pretrained` writes; networks in fp32.

    `base` is a hub id or a local folder. Raises `UserError` when it is neither, or holds no such part.
    """
    check_present(base)
    if Path(base).exists() and not (Path(base) / part).is_dir():
        raise UserError(f"{base} has no {part}/ folder: it must be a pipeline folder in diffusers layout")
    transformers.utils.logging.disable_progress_bar()
    with loading(f"cannot load {part} of {base}", base):
        loaded = kind.from_pretrained(base, subfolder=part, revision=revision)
    return loaded.float() if isinstance(loaded, torch.nn.Module) else loaded


def load_part_config(
    base: str, part: str, kind: type, revision: str | None = None, *, local: bool = False
) -> dict:
    """The config of one part, without its weights; raises `UserError` where it cannot be had (`local`: without a network)."""
    check_present(base)
    with loading(f"cannot read the config of {part} of {base}"), quietly():
        return kind.load_config(base, subfolder=part, revision=revision, local_files_only=local)


def load_pipeline_class(base: str, revision: str | None = None) -> str:
    """The class of the pipeline that a folder or hub id holds, from its model_index.json; raises `UserError` without one."""
    check_present(base)
    with (
        loading(f"{base} is no pipeline folder in diffusers layout, its model_index.json cannot be read"),
        quietly(),
    ):
        return diffusers.DiffusionPipeline.load_config(base, revision=revision)["_class_name"]


@contextmanager
def loading(failure: str, name: str | None = None) -> Iterator[None]:
    """Raise a `UserError` that begins with `failure` for a file that cannot be had; of a hub's `name` it says what to check."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        hub = name is not None and not Path(name).exists()
        where = " (check the name and the network, or give a local folder)" if hub else ""
        raise UserError(f"{failure}: {str(error).strip().splitlines()[0]}{where}") from None


def check_present(name: str) -> None:
    """Raise `UserError` unless `name` is a path that exists or looks like a hub id, of a repository that was not removed."""
    if name == REMOVED:
        raise UserError(f"{REMOVED} was removed from the Hub; use {MAINTAINED}")
    if not Path(name).exists() and (name.count("/") != 1 or name[0] in "/.~"):
        raise UserError(f"{name} does not exist (and is no hub id, which would be of the form owner/name)")


@functools.lru_cache
def files_digest(base: str, part: str, revision: str | None = None) -> str:
    """What says that a part's files are the same as before: sha256 of the weights of a local folder, a hub's commit.

    Of a local folder the safetensors that `load_part` reads count, else the .bin files. Read once in a process.
    """
    folder = Path(base) / part
    if not folder.is_dir():
        found = try_to_load_from_cache(base, "scheduler/scheduler_config.json", revision=revision or "main")
        return Path(found).parents[1].name if isinstance(found, str) else str(revision)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
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
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(f"{tuple(tensor.shape)}".encode() + data).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
