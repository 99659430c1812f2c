"""The door for every model of diffusers or transformers, in a local folder or on a hub. Every room may import this.

    vae = load_pretrained(AutoencoderKL, "data/models/sd15", "vae of data/models/sd15", part="vae")

Others wrote these files. No code in them ever runs and nothing is unpickled, no question is asked, weights that are missing are
an error, and whatever the libraries raise becomes one line. A hub is asked only for what its local cache does not have.
"""

import importlib
import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.reading import read_record

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
FILES = (*PICKLES, ".safetensors")
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
HUB_SECONDS = 5  # within which a hub must answer the first question
REASON = 200  # characters of a library's reason in an error line
NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")  # of a layer, in the name of a weight
SAVED = "give a whole folder that save_pretrained wrote"
THREE = Field(min_length=3, max_length=3)
T = TypeVar("T")


@with_config(strict=True)
class PixelStatistics(TypedDict):
    """What preprocessor_config.json says of RGB pixels in [0, 1]."""

    image_mean: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], THREE]
    image_std: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], THREE]


def load_pretrained(
    kind: type, name: str, what: str, *, part: str | None = None, revision: str | None = None, **options
):
    """Return what `kind.from_pretrained` makes of a local folder, or of a hub id whose files may be in the local cache.

    `kind` is a class of diffusers or transformers: a network, a scheduler, a tokenizer, a pipeline or an `AutoModel`. `what`
    names it in errors: "vae of data/models/sd15". `part` is the folder below `name`, as diffusers lays out a pipeline. Raises
    `UserError`, one line, for anything but a whole model of this kind in safetensors.
    """
    library = kind.__module__.partition(".")[0]
    network = issubclass(kind, torch.nn.Module) or kind.__name__.startswith("AutoModel")
    config_file = getattr(kind, "config_name", "config.json" if network else None)
    pipeline = config_file == "model_index.json"
    if (folder := local_folder(name)) is not None:
        for place in [folder, *folder.glob("*/")] if pipeline else [folder / (part or "")]:
            check_files(place, network=network)
    if config_file is not None:
        config = read_config(name, config_file, what, part=part, revision=revision)
        if network:
            _check_kind(config, kind, what)
    options |= {"revision": revision} | ({} if part is None else {"subfolder": part})
    if pipeline or network:
        options["use_safetensors"] = True
    if pipeline or library == "transformers":
        options["trust_remote_code"] = False
    if network and library == "transformers":
        # Its own error is a table on the terminal; ours names the weights.
        options["ignore_mismatched_sizes"] = True

    def load(**where):
        with _quiet(library):
            if not network:
                return kind.from_pretrained(name, **where, **options)
            loaded, report = kind.from_pretrained(name, output_loading_info=True, **where, **options)
        faults = {"missing_keys": "lacks weights", "mismatched_keys": "has weights of other shapes"}
        for key, says in faults.items():
            if report[key]:
                first = f"{min(map(str, report[key])):.{REASON}}"
                raise UserError(f"{what} {says} ({first}, …), which would be random: give a whole model")
        own = {NUMBER.sub("#", key) for key in loaded.state_dict()}
        if beyond := [key for key in report["unexpected_keys"] if NUMBER.sub("#", key) in own]:
            raise UserError(
                f"{what} has weights of more layers than its config says ({min(beyond):.{REASON}}, …): give a whole model"
            )
        return loaded

    return _found(load, name, what, revision)


def read_config(
    name: str, file: str, what: str, *,
    part: str | None = None, revision: str | None = None, local: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return a JSON file of a folder or hub id; raises `UserError` where it is none (`local`: without asking a hub)."""
    if (folder := local_folder(name)) is not None:
        path = folder / (part or "") / file
        if not path.exists():
            raise UserError(f"{path} cannot be read, it is not there: {SAVED}")
    else:

        def download(**where) -> str:
            return hf_hub_download(name, file, subfolder=part, revision=revision, **where)

        path = _found(download, name, what, revision, local=local)
    return read_record(path, dict[str, Any], SAVED)


def read_optional(
    name: str, file: str, schema: type[T], what: str, *, revision: str | None = None
) -> T | None:
    """Return a JSON file that a folder or hub id need not have, by its schema; None where it has none.

    A hub that does not answer counts as having none, and a warning says so.
    """
    if (folder := local_folder(name)) is not None:
        path = folder / file
        return read_record(path, schema, SAVED) if os.path.lexists(path) else None
    if (path := try_to_load_from_cache(name, file, revision=revision)) is None:
        try:
            files = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).siblings
            if all(found.rfilename != file for found in files):
                return None
            path = hf_hub_download(name, file, revision=revision)
        except Exception as error:  # the network, the hub or its client, in whichever way
            print(f"warning: {what} is used without its {file}: {reason_of(error)}", file=sys.stderr)
            return None
    return read_record(path, schema, SAVED) if isinstance(path, str) else None


def local_folder(name: str) -> Path | None:
    """Return the local folder that a name says, and None for a hub id; raises `UserError` for a name that is neither."""
    if name in MOVED:
        raise UserError(f"{name} was removed from the Hub; use {MOVED[name]}")
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name):
        raise UserError(f"{name} is no folder of a model (nor a file that is read here): check the path")
    # a/b is a path rather than a hub id where there is a folder a, or where it ends like a file.
    if not HUB_ID.fullmatch(name) or name.endswith(FILES) or os.path.isdir(name.partition("/")[0]):
        raise UserError(f"{name} does not exist: check the path (a hub id would be of the form owner/name)")
    return None


def check_files(folder: Path, *, network: bool) -> None:
    """Raise `UserError` unless a folder holds regular files alone, and safetensors where it holds weights of a network."""
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no {folder.name}/ folder: give a folder in diffusers' layout")
    files = [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    for path in files:
        if not path.is_file():  # to open a FIFO would wait for its writer
            raise UserError(f"{path} is no regular file: put the file in its place")
    pickles = [path for path in files if path.suffix in PICKLES]
    if network and pickles and not any(path.suffix == ".safetensors" for path in files):
        raise UserError(
            f"{pickles[0]} is a pickle, which could run code, and is not read: load it once where you trust it and call "
            "save_pretrained(…, safe_serialization=True)"
        )


@contextmanager
def foreign_files(what: str) -> Iterator[None]:
    """Turn whatever a library raises on files that others wrote into one line about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A config of nonsense raises anything: TypeError, SafetensorError, RecursionError, …
        raise UserError(f"cannot load {what}: {reason_of(error)}: {SAVED}") from None


def reason_of(error: Exception) -> str:
    """Return a library's message, cut to what fits into one line."""
    text = textwrap.shorten(str(error), REASON, placeholder=" …").rstrip(".:")
    named = isinstance(error, LookupError) or not text  # the text of a KeyError is the key alone
    return f"{type(error).__name__} {text}".strip() if named else text


def _found(get: Callable, name: str, what: str, revision: str | None, *, local: bool = False):
    """Return what `get` finds: in the local folder, else in the hub's local cache, else at the hub, unless `local`."""
    if local_folder(name) is not None:
        with foreign_files(what):
            return get(local_files_only=True)
    try:
        return get(local_files_only=True)
    except OSError:
        missing = "it is not (or not whole) in the local cache of the hub"
    except UserError:
        raise
    except Exception as error:  # as in `foreign_files`
        missing = f"its files in the local cache of the hub are damaged ({reason_of(error)})"
    if local:
        raise UserError(f"cannot load {what}: {missing}")
    try:  # one question of a few seconds, before the libraries' own, which are asked again and again
        HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # the network, the hub or its client, in whichever way
        raise UserError(
            f"cannot load {what}: {missing}, and the hub does not give it ({reason_of(error)}): check the name and the "
            "network, or give a local folder"
        ) from None
    with foreign_files(what):
        return get(local_files_only=False)


def _check_kind(config: dict, kind: type, what: str) -> None:
    """Raise `UserError` where a config names another class than `kind`; the callers of an `AutoModel` look themselves."""
    if issubclass(kind, torch.nn.Module):
        of_transformers = hasattr(kind, "config_class")
        wanted = kind.config_class.model_type if of_transformers else kind.__name__
        found = config.get("model_type" if of_transformers else "_class_name", wanted)
        if found != wanted:
            raise UserError(f"{what} is of the kind {found!r:.60}; {wanted} was expected")


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library from printing: what matters of it stands in our own line."""
    log = importlib.import_module(f"{library}.utils.logging")
    verbosity = log.get_verbosity()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        log.set_verbosity(verbosity)
