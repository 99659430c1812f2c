"""The text of a training: a field of shards like any other, whose values are the named text fields of a prompt.

    text = TextReader("data/imagenet/text")
    text.prompts[1], text.null["prompt_embeds"]     # "a photo of a goldfish", (L, C)
    text.fields_of([1, 0])["prompt_embeds"]         # (2, L, C), read from the shards
    table = text.on(device, dtype)                  # the rows of all prompts, in memory

Beside the shards, `prompts.json` lists the prompts by label: those of the classes in the order of the classes, captions in the
order of their first appearance. The key of a row is a digest of its prompt, so equal prompts are stored once. The null prompt
has a key of its own, because some pipelines make it otherwise than of the prompt "". Labels never change: more prompts are
added behind those that are there, and the manifest counts those whose rows are stored.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache.manifest import SETTINGS, Count, TextSpec, check_same, digest_of, read_manifest, read_settings
from cache.reader import FieldReader
from cache.shard_plan import SHARD_SIZE
from cache.shards import FieldWriter
from common.errors import UserError
from common.files import write_json
from common.reading import JsonRecord, read_record

PROMPTS, OLD_TABLE = "prompts.json", "text.safetensors"
NULL = "null"  # the key of the null prompt
SHARD_BYTES = 4 * 2**30  # of a new folder's shards, at most: large text gets shards of fewer rows
TABLE_BYTES = 2 * 10**9  # data.text_on_device=auto: the largest table that is kept on the device
WIDTH = 32  # letters of a caption above a picture


class Prompts(JsonRecord):
    """prompts.json."""

    n_classes: Count  # so many of the prompts, the first, belong to classes
    synsets: list[str]  # of the classes, where they are known
    prompts: list[str]  # by label


@dataclass(frozen=True)
class TextTable:
    """The named fields `(n_prompts, …)` of all prompts in memory."""

    fields: dict[str, Tensor]

    def fields_of(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the fields `(B, …)` of the prompts with these labels."""
        return {name: values[labels] for name, values in self.fields.items()}


class TextReader:
    """Reads the text that script 4 stored in a folder.

    Raises `UserError` when the folder is unfinished, damaged or of an older format, or when its prompts have been edited.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        listed = read_listed(folder, read_text_manifest(folder))
        self.prompts, self.n_classes, self.synsets = listed["prompts"], listed["n_classes"], listed["synsets"]
        self.reader = FieldReader(folder, "text")
        self.spec, self.manifest = self.reader.spec, self.reader.manifest
        self._rows = self.reader.rows([key_of(prompt) for prompt in self.prompts])  # (n_prompts,)
        self.null = {name: values[0] for name, values in self.reader.read([NULL]).items()}  # {name: (…)}

    def __len__(self) -> int:
        """The number of prompts without the null prompt."""
        return len(self.prompts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{field: shape of one prompt's row}."""
        return {name: tuple(values.shape) for name, values in self.null.items()}

    @cached_property
    def label_of(self) -> dict[str, int]:
        """The label of each prompt; the first one of equal prompts."""
        return {prompt: label for label, prompt in reversed([*enumerate(self.prompts)])}

    def rows_of(self, labels: Tensor | Sequence[int]) -> np.ndarray:
        """Return the rows `(B,)` of the shards that hold the prompts with these labels."""
        return self._rows[np.asarray(labels)]

    def fields_of(self, labels: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Read the fields `(B, …)` of the prompts with these labels, in the types in which they are stored."""
        raw = torch.empty(len(labels), self.spec.value_bytes, dtype=torch.uint8)
        self.reader.read_rows(self.rows_of(labels), raw.numpy())
        return self.spec.decode(raw)

    def on(self, device: torch.device, dtype: torch.dtype) -> TextTable:
        """Return the text of all prompts on a device, converted as by `convert`."""
        return TextTable(convert(self.fields_of(range(len(self))), device, dtype))


def convert(fields: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return fields on a device, those of floating-point numbers in `dtype`; masks keep their type."""
    return {n: v.to(device, dtype if v.is_floating_point() else v.dtype) for n, v in fields.items()}


def drop_captions(
    text: Mapping[str, Tensor], null: Mapping[str, Tensor], probability: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Replace each caption of `text (B, …)` by `null (…)` with the given probability, for classifier-free guidance."""
    first = next(iter(text.values()))
    dropped = torch.rand(len(first), device=first.device, generator=generator) < probability  # (B,)
    as_wide_as = {name: dropped.view(-1, *[1] * (values.ndim - 1)) for name, values in text.items()}
    return {name: torch.where(as_wide_as[name], null[name], values) for name, values in text.items()}


def is_shorter(name: str, held: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a field of text differs from `shape` in its length alone, and is shorter."""
    dim = -1 if name.endswith("mask") else -2
    if len(held) != len(shape) or len(shape) < -dim:
        return False
    return held[dim] <= shape[dim] and (*held[:dim], shape[dim], *held[dim:][1:]) == tuple(shape)


def table_bytes(shapes: Iterable[Sequence[int]], prompts: int, dtype: torch.dtype) -> int:
    """Return the bytes of `prompts` rows of fields of these shapes, and of the null prompt's."""
    return (prompts + 1) * sum(map(math.prod, shapes)) * dtype.itemsize


def keeps_table(setting: str | bool, size: int) -> bool:
    """Return whether data.text_on_device keeps a table of `size` bytes on the device."""
    return size <= TABLE_BYTES if setting == "auto" else bool(setting)


def key_of(prompt: str) -> str:
    """Return the key of a prompt's row."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def read_text_manifest(folder: str | Path) -> dict:
    """Return the manifest of a folder of text; raises `UserError` as `read_manifest`, and for a table of the older format."""
    check_format(folder)
    return read_manifest(folder, "text")


def check_format(folder: str | Path) -> None:
    """Raise `UserError` for a folder of text of the older format."""
    if os.path.lexists(Path(folder) / OLD_TABLE):
        raise UserError(
            f"{folder} holds text of an older format ({OLD_TABLE}): delete it and run script 4 again"
        )


def read_listed(folder: str | Path, manifest: dict | None = None) -> Prompts:
    """Return what prompts.json lists: all that is there, or what the manifest counts; raises `UserError` if it was edited."""
    path, remedy = Path(folder) / PROMPTS, "restore it, or delete it and run script 4 again"
    listed = read_record(path, Prompts, remedy)
    if manifest is not None:
        listed |= {"prompts": listed["prompts"][: manifest["num_prompts"]]}
        if prompts_digest(listed) != manifest["prompts_sha256"]:
            raise UserError(f"{path} is not the one that its manifest describes: {remedy}")
    return listed


def join_prompts(folder: Path, listed: Prompts) -> Prompts:
    """Return the prompts that a folder has, and behind them those of `listed` that are new.

    Raises `UserError` where the prompts of its classes are others.
    """
    check_format(folder)
    if not os.path.lexists(folder / PROMPTS):
        return listed
    known = read_listed(folder)
    classes, wanted = (names["prompts"][: names["n_classes"]] for names in (known, listed))
    if classes != wanted or known["synsets"] != listed["synsets"]:
        pairs = ((a, b) for a, b in zip(classes, wanted, strict=False) if a != b)
        there, here = next(pairs, (f"{len(classes)} classes", f"{len(wanted)} classes"))
        raise UserError(
            f"{folder} was made for other classes ({there!r:.60} there, {here!r:.60} here): choose another --out"
        )
    others = known["prompts"][len(classes) :] + listed["prompts"][len(classes) :]
    return known | {"prompts": [*classes, *dict.fromkeys(others)]}


def prompts_digest(listed: Prompts) -> str:
    """Return the digest of a list of prompts."""
    return digest_of(dict(listed))


def text_digest(manifest: dict) -> str:
    """Return the digest of the prompts and of every stored number, however they lie in shards."""
    checksum = sum(shard["checksum"] for shard in manifest["shards"])
    about = {"fields": manifest["details"]["fields"], "prompts": manifest["prompts_sha256"]}
    return digest_of(about | {"checksum": checksum})


def open_writer(
    folder: str | Path,
    spec: TextSpec,
    listed: Prompts,
    *,
    part: tuple[int, int] = (0, 1),
    shard_size: int | None = None,
) -> FieldWriter:
    """Write prompts.json, and return the writer of the rows of its prompts and of the null prompt (keys: `key_of`, `NULL`)."""
    folder = Path(folder)
    if (folder / SETTINGS).exists():  # checked before prompts.json is touched
        check_same(folder, read_settings(folder), spec.as_json())
    elif shard_size is None:
        shard_size = max(1, min(SHARD_SIZE, SHARD_BYTES // spec.value_bytes))
    if not (folder / PROMPTS).exists() or read_listed(folder) != listed:
        write_json(folder / PROMPTS, listed)
    keys = [*dict.fromkeys(map(key_of, listed["prompts"])), NULL]
    about = {"num_prompts": len(listed["prompts"]), "prompts_sha256": prompts_digest(listed)}
    return FieldWriter(folder, spec, keys, shard_size=shard_size, part=part, also=about)


def write_text(
    folder: str | Path,
    spec: TextSpec,
    listed: Prompts,
    fields: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    **options,
) -> None:
    """Store fields `(n_prompts, …)` in memory, by label, and those `(…)` of the null prompt; `options` of `open_writer`."""
    writer = open_writer(folder, spec, listed, **options)
    rows = dict(zip(map(key_of, listed["prompts"]), spec.encode(fields), strict=True))
    rows[NULL] = spec.encode({name: values[None] for name, values in null.items()})[0]
    for shard, keys in writer.pending(len(rows)):
        writer.put(shard, keys, torch.stack([rows[key] for key in keys]))
    writer.finish()


def prompts_of_text(folder: str | Path) -> list[str]:
    """Return the prompts of a folder of text by label."""
    return read_listed(folder, read_text_manifest(folder))["prompts"]


def shown_prompts(folder: str | Path) -> list[str]:
    """Return what a picture shows of each prompt: the name of a class, or the beginning of a caption."""
    names = class_names(folder)
    captions = prompts_of_text(folder)[len(names) :]
    return names + [p if len(p) <= WIDTH else f"{p[: WIDTH - 2].rstrip()} …" for p in captions]


def find_prompts(folder: str | Path, wanted: Sequence[str], option: str) -> list[int]:
    """Return the labels of prompts, each given by its number or its text; raises `UserError`, which names the `option`."""
    prompts, labels = prompts_of_text(folder), []
    for word in wanted:
        if word in prompts:
            labels.append(prompts.index(word))
        elif re.fullmatch("-?[0-9]{1,9}", word):
            if not 0 <= int(word) < len(prompts):
                raise UserError(f"{option} {word}: prompts and classes are 0 to {len(prompts) - 1}")
            labels.append(int(word))
        else:
            raise UserError(
                f"{option} {word!r:.80}: {folder} has no such prompt; add it by script 4 with --prompts FILE, one a line"
            )
    return labels


def class_names(folder: str | Path) -> list[str]:
    """Return the names of the classes, which are their prompts without the template; none where there are only captions."""
    manifest = read_text_manifest(folder)
    listed = read_listed(folder, manifest)
    before, after = manifest["details"].get("template", "{class_name}").split("{class_name}", 1)
    return [p.removeprefix(before).removesuffix(after) for p in listed["prompts"][: listed["n_classes"]]]
