"""The two JSON files that describe a cached field: its settings and its manifest.

A field is a folder. The writer creates `settings.json` first, which records the specification that the folder is meant for,
and `manifest.json` last, which records what the folder contains. A folder without a manifest is unfinished, and readers refuse
it. `cache/shards.py` describes the whole format.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import torch
from pydantic import Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from cache.encodings import ENCODINGS
from common.errors import UserError
from common.files import write_json
from common.reading import RECORD, read_record

FORMAT, VERSION = "urepa-cache", 3
MANIFEST, SETTINGS, UNREADABLE = "manifest.json", "settings.json", "unreadable.csv"
UNREADABLE_COLUMNS = ("id", "shard", "problem")
Count, Size = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1, lt=2**31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.lmdb$")]  # in the same folder
Template = Annotated[str, Field(pattern=r"\{class_name\}")]


@with_config(RECORD)
class View(TypedDict, total=False):
    """The square that the model saw; the text has none."""

    kind: str
    size: Size  # px
    patch: Size  # px
    grid: Size  # tokens per side


@with_config(RECORD)
class ImageDetails(TypedDict, total=False):
    """What only latents have."""

    posterior: Literal["mode", "sample", "moments"]
    scaled: bool
    # As they were written, for 1 and 1.0 have different seals; of --unscaled, where x_0 = (z - mean) * scaling_factor.
    scaling_factor: int | float | list[float]
    mean: int | float | list[float]


@with_config(RECORD)
class NamedField(TypedDict):
    """One of the named fields of the text."""

    shape: list[Size]  # of one prompt
    dtype: Literal["float16", "bfloat16", "float32", "uint8"]  # masks are uint8


@with_config(RECORD)
class TextDetails(TypedDict):
    """What only the text has."""

    fields: dict[str, NamedField]
    trimmed: NotRequired[
        dict[str, str]
    ]  # fields cut behind the longest prompt, and the mask that says where that is
    template: NotRequired[Template]  # of the prompts of classes


@with_config(RECORD)
class Specification(TypedDict):
    """A `FieldSpec` as JSON."""

    format: Literal[FORMAT]
    version: Literal[VERSION]
    field: Literal["latents", "tokens"]
    shape: list[Size]
    dtype: Literal[*ENCODINGS]
    meaning: str
    source: dict[str, str | None]
    view: View
    details: ImageDetails


@with_config(RECORD)
class Settings(Specification):
    """settings.json of latents and tokens."""

    shard_size: Size


@with_config(RECORD)
class TextSettings(Settings):
    """settings.json of the text."""

    field: Literal["text"]
    details: TextDetails


@with_config(RECORD)
class ShardEntry(TypedDict):
    """A finished shard."""

    file: ShardName
    count: Count
    bytes: Count
    checksum: Count


@with_config(RECORD)
class ImageManifest(Specification):
    """manifest.json of latents and tokens."""

    num_samples: Count
    num_unreadable: Count
    ids_sha256: Sha256
    shards: list[ShardEntry]
    seal: Sha256


@with_config(RECORD)
class TextManifest(ImageManifest):
    """manifest.json of the text."""

    field: Literal["text"]
    details: TextDetails
    num_prompts: Size  # of prompts.json, which may hold more by now
    prompts_sha256: Sha256  # of these


AnyManifest = Annotated[ImageManifest | TextManifest, Field(discriminator="field")]
AnySettings = Annotated[Settings | TextSettings, Field(discriminator="field")]


@dataclass(frozen=True)
class FieldSpec:
    """The specification of a field. The manifest records every attribute, and reading fails where one is missing."""

    field: str  # latents, tokens or text
    shape: tuple[int, ...]  # of one value, without a batch dimension
    dtype: str  # as stored, a key of ENCODINGS; numbers are little-endian
    meaning: str  # what a value is, in words
    # The model that made the values: its id, its revision, the digest of its weights, the precision it ran in.
    source: dict = field(default_factory=dict)
    view: dict = field(default_factory=dict)  # the square that the model saw: kind, size in px, token grid
    details: dict = field(default_factory=dict)  # what only this field needs, such as a scaling factor

    @property
    def value_bytes(self) -> int:
        """The number of bytes of one stored value."""
        return ENCODINGS[self.dtype].value_bytes(self.shape)

    def encode(self, values: Tensor) -> Tensor:
        """Encode `values (n, *shape)` to the bytes that are stored, uint8 `(n, value_bytes)`, on the same device."""
        if values.shape[1:] != self.shape:
            raise ValueError(f"{self.field}: expected (n, *{self.shape}), got {tuple(values.shape)}")
        return ENCODINGS[self.dtype].encode(values)

    def decode(self, raw: Tensor) -> Tensor:
        """Decode bytes `raw (n, value_bytes)` to values `(n, *shape)` on the same device, if possible as a view of `raw`."""
        return ENCODINGS[self.dtype].decode(raw, self.shape)

    def is_finite(self, raw: Tensor) -> bool:
        """Return whether bytes `raw (n, value_bytes)` hold finite numbers alone."""
        return _is_finite(self.decode(raw))

    @property
    def form(self) -> str:
        """Shape and stored type of a value, in words."""
        return f"{self.shape} {self.dtype}"

    def agrees_with(self, other: "FieldSpec") -> bool:
        """Return whether both have the same field, shape, view and details, and come from the same weights and pixels."""
        names = ("field", "shape", "view", "details")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        made_by = ("weights_sha256", "normalisation")
        return same and all(self.source.get(name) == other.source.get(name) for name in made_by)

    def as_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, data: dict) -> "FieldSpec":
        known = {entry.name: data[entry.name] for entry in fields(cls)}
        kind = TextSpec if data["field"] == "text" else cls
        return kind(**known | {"shape": tuple(data["shape"])})


@dataclass(frozen=True)
class TextSpec(FieldSpec):
    """The specification of text: a value is a dict of the named fields of `details["fields"]`, stored one after the other.

    Fields of wider numbers come first and a row is a multiple of four bytes, so that `decode` can give views.
    """

    @classmethod
    def of(cls, named: Mapping[str, NamedField], meaning: str, source: dict, details: dict) -> "TextSpec":
        """Return the specification of these named fields."""
        size = sum(ENCODINGS[form["dtype"]].value_bytes(form["shape"]) for form in named.values())
        return cls(
            "text", (-(-size // 4) * 4,), "uint8", meaning, source, {}, {"fields": dict(named)} | details
        )

    @property
    def fields(self) -> dict[str, NamedField]:
        """The named fields in the order in which they are stored."""
        named = self.details["fields"].items()
        return dict(sorted(named, key=lambda item: (-ENCODINGS[item[1]["dtype"]].value_bytes([1]), item[0])))

    def encode(self, values: Mapping[str, Tensor]) -> Tensor:
        """Encode named fields, each `(n, …)`, to the bytes that are stored, uint8 `(n, value_bytes)`."""
        rows = []
        for name, form in self.fields.items():
            if list(values[name].shape[1:]) != form["shape"]:
                raise ValueError(f"{name}: expected (n, *{form['shape']}), got {tuple(values[name].shape)}")
            rows.append(ENCODINGS[form["dtype"]].encode(values[name]))
        row = torch.cat(rows, dim=1)
        return torch.nn.functional.pad(row, (0, self.value_bytes - row.shape[1]))

    def decode(self, raw: Tensor) -> dict[str, Tensor]:
        """Decode bytes `raw (n, value_bytes)` to the named fields, each `(n, …)`, as views of `raw`."""
        values, start = {}, 0
        for name, form in self.fields.items():
            encoding = ENCODINGS[form["dtype"]]
            end = start + encoding.value_bytes(form["shape"])
            values[name] = encoding.decode(raw[:, start:end], form["shape"])
            start = end
        return values

    def is_finite(self, raw: Tensor) -> bool:
        return all(map(_is_finite, self.decode(raw).values()))

    @property
    def form(self) -> str:
        return ", ".join(
            f"{name} {tuple(form['shape'])} {form['dtype']}" for name, form in self.fields.items()
        )


def _is_finite(values: Tensor) -> bool:
    # Minimum and maximum are finite only if all values are, and finding them is far cheaper than isfinite() on fp16.
    return not len(values) or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write a finished field's manifest with its seal, the digest of all the rest."""
    write_json(folder / MANIFEST, manifest | {"seal": digest_of(manifest)})


def read_manifest(folder: str | Path, field: str) -> dict:
    """Return a finished field's manifest without its seal.

    Raises `UserError` if it is missing, damaged, edited, or for another format, field or folder.
    """
    path = Path(folder) / MANIFEST
    remedy = "restore it, or delete it and run the script that wrote it again"
    if not path.exists():
        state = "is not finished" if (path.parent / SETTINGS).exists() else "is not a cache"
        raise UserError(f"{folder} {state} (no {MANIFEST}): run the preprocessing script that writes it")
    manifest = read_record(path, AnyManifest, remedy)
    if manifest.pop("seal") != digest_of(manifest):
        raise UserError(f"{path} was edited by hand: {remedy}")
    if manifest["field"] != field:
        raise UserError(f"{folder} holds {manifest['field']}, not {field}: check the paths")
    if wrong := _contradiction(manifest):
        raise UserError(f"{path} contradicts itself ({wrong}): {remedy}")
    if (path.parent / SETTINGS).exists():  # the manifest may be a copy from another cache
        settings = read_settings(path.parent)
        if other := [
            entry.name for entry in fields(FieldSpec) if settings[entry.name] != manifest[entry.name]
        ]:
            raise UserError(f"{path} is not this folder's own (another {other[0]} than {SETTINGS}): {remedy}")
    return manifest


def read_settings(folder: Path) -> Settings:
    """Return what a field's folder is meant for."""
    remedy = f"restore it, or delete {folder} and run the script that wrote it again"
    return read_record(folder / SETTINGS, AnySettings, remedy)


def _contradiction(manifest: dict) -> str | None:
    """Return what of a manifest cannot be true together with the rest of it."""
    shape, details, view = manifest["shape"], manifest["details"], manifest["view"]
    shards = manifest["shards"]
    if sum(shard["count"] for shard in shards) != manifest["num_samples"]:
        return "num_samples and the counts of its shards"
    if len({shard["file"] for shard in shards}) < len(shards):
        return "two shards of one name"
    if manifest["field"] == "text":
        size = TextSpec.of(details["fields"], "", {}, {}).shape[0]
        return None if shape == [size] and manifest["dtype"] == "uint8" else "shape and details.fields"
    if len(shape) != (3 if manifest["field"] == "latents" else 2):
        return f"a shape {shape} of {manifest['field']}"
    return "shape and grid" if "grid" in view and shape[0] != view["grid"] ** 2 else None


def digest_of(content: dict) -> str:
    """Return the SHA-256 of JSON, whatever the order of its keys and its blanks."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ids_digest(ids: Iterable[str]) -> str:
    """Return the SHA-256 of a list of ids; their order matters."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def check_same(folder: Path, known: dict, wanted: dict) -> None:
    """Raise `UserError` where the `known` settings of a folder differ from the `wanted` ones."""
    for key, value in wanted.items():
        if (there := known.get(key)) != value:
            what = f"another {key} ({there!r} there, {value!r} here)"
            raise UserError(f"{folder} was written with {what}: choose another folder or delete that one")
