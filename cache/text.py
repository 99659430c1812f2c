"""The table of text embeddings: a row for the prompt of each class, and a last row for the null prompt of guidance."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load, save
from torch import Tensor

from cache.manifest import MANIFEST, FieldSpec, read_manifest, write_manifest
from common.errors import UserError
from common.files import write_atomically
from common.reading import read_bytes

TABLE = "text.safetensors"
WIDTH = 32  # letters of a caption above a picture
HEADER = 2**20  # bytes, more than the names and shapes in the file take


@dataclass(frozen=True)
class TextTable:
    """The text fields of all prompts: row c belongs to class c, and the last row is the null prompt."""

    # Each is (n_prompts + 1, …), such as prompt_embeds (1001, 77, 768), and named after an argument of the pipeline's call.
    fields: dict[str, Tensor]

    def __len__(self) -> int:
        """The number of prompts without the null prompt."""
        return len(next(iter(self.fields.values()))) - 1

    def rows(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Return the fields `(B, …)` of the prompts with these indices."""
        return {name: values[indices] for name, values in self.fields.items()}

    @property
    def prompts(self) -> dict[str, Tensor]:
        """The fields `(n_prompts, …)` of all prompts but the null prompt."""
        return {name: values[:-1] for name, values in self.fields.items()}

    @property
    def null(self) -> dict[str, Tensor]:
        """The fields `(…)` of the null prompt."""
        return {name: values[-1] for name, values in self.fields.items()}

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextTable":
        """Return the table on a device, with floating-point fields converted to `dtype`; masks keep their type."""
        kept = {name: values.to(device) for name, values in self.fields.items()}
        return TextTable({name: v.to(dtype) if v.is_floating_point() else v for name, v in kept.items()})


def drop_captions(
    text: Mapping[str, Tensor], null: Mapping[str, Tensor], probability: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Replace each caption of `text (B, …)` by `null (…)` with the given probability, for classifier-free guidance."""
    first = next(iter(text.values()))
    dropped = torch.rand(len(first), device=first.device, generator=generator) < probability  # (B,)
    as_wide_as = {name: dropped.view(-1, *[1] * (values.ndim - 1)) for name, values in text.items()}
    return {name: torch.where(as_wide_as[name], null[name], values) for name, values in text.items()}


def write_table(folder: str | Path, fields: Mapping[str, Tensor], spec: FieldSpec) -> None:
    """Store the fields of all prompts, each `(rows, …)`, as one safetensors file with a manifest beside it."""
    folder = Path(folder)
    (folder / MANIFEST).unlink(missing_ok=True)  # an old manifest must not vouch for the new table
    content = save({name: values.contiguous() for name, values in fields.items()})
    write_atomically(folder / TABLE, content)
    (rows,) = {len(values) for values in fields.values()}
    about = {"rows": rows, "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, spec.as_json() | about)


def text_spec(
    fields: Mapping[str, Tensor], meaning: str, *, source: dict | None = None, details: dict | None = None
) -> FieldSpec:
    """Return the specification of a table; its details record the shape of one row of each field."""
    shapes = {name: list(values.shape[1:]) for name, values in fields.items()}
    dtype = str(next(iter(fields.values())).dtype).removeprefix("torch.")
    return FieldSpec("text", (), dtype, meaning, source or {}, {}, {"fields": shapes} | (details or {}))


def read_table(folder: str | Path) -> tuple[TextTable, dict]:
    """Return the table that `write_table` stored, and its manifest; raises `UserError` when the file has changed since."""
    folder = Path(folder)
    manifest = read_manifest(folder, "text")
    numbers = sum(map(math.prod, manifest["details"]["fields"].values())) * manifest["rows"]
    whole = (folder / TABLE).is_file()
    content = read_bytes(folder / TABLE, limit=8 * numbers + HEADER) if whole else b""
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        problem = "is not the file its manifest describes"
        todo = f"restore it, or delete {folder} and run preprocessing script 4 again"
        raise UserError(f"{folder / TABLE} {problem}: {todo}")
    return TextTable(load(content)), manifest


def prompts_of_text(folder: str | Path) -> list[str]:
    """Return the prompts of a folder of text by their rows, without the null prompt; none where it does not tell them."""
    return read_manifest(folder, "text")["details"].get("prompts", [])[:-1]


def shown_prompts(folder: str | Path) -> list[str]:
    """Return what a picture shows of each prompt: the name of a class, or the beginning of a caption."""
    names = class_names(read_manifest(folder, "text"))
    return list(names.values()) or [shorten(p, WIDTH, placeholder=" …") for p in prompts_of_text(folder)]


def find_prompts(folder: str | Path, wanted: Sequence[str], option: str) -> list[int]:
    """Return the rows of prompts, each given by its number or its text; raises `UserError`, which names the `option`."""
    prompts, rows = prompts_of_text(folder), []
    for word in wanted:
        if word in prompts:
            rows.append(prompts.index(word))
        elif re.fullmatch("-?[0-9]{1,9}", word):
            if not 0 <= int(word) < len(prompts):
                raise UserError(f"{option} {word}: prompts and classes are 0 to {len(prompts) - 1}")
            rows.append(int(word))
        else:
            raise UserError(
                f"{option} {word!r:.80}: {folder} has no such prompt; add it by script 4 with --prompts FILE, one a line"
            )
    return rows


def class_names(text_manifest: dict) -> dict[int, str]:
    """Return the names of the classes, taken from the prompts in the manifest; empty if the manifest has no template."""
    details = text_manifest["details"]
    if "template" not in details:
        return {}
    before, after = details["template"].split("{class_name}", 1)
    prompts = details["prompts"][:-1]  # the last is the null prompt
    return {i: prompt.removeprefix(before).removesuffix(after) for i, prompt in enumerate(prompts)}
