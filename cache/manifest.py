"""The two JSON files that describe a cached field: its settings and its manifest.

A field is a folder. The writer creates `settings.json` first, which records the specification that the folder is meant for,
and `manifest.json` last, which records what the folder contains. A folder without a manifest is unfinished, and readers refuse
it. `cache/shards.py` describes the whole format.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from torch import Tensor

from cache.encodings import ENCODINGS
from common.errors import UserError

FORMAT, VERSION = "urepa-cache", 3
MANIFEST, SETTINGS, UNREADABLE = "manifest.json", "settings.json", "unreadable.csv"
TABLE_KEYS = {"rows", "sha256"}
SHARD_KEYS = {"num_samples", "ids_sha256", "shards"}
SHARD_ENTRY = {"file", "count", "bytes", "checksum"}  # keys of each entry of `shards`


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

    def agrees_with(self, other: "FieldSpec") -> bool:
        """Return whether both have the same field, shape, view and details, and come from the same weights."""
        names = ("field", "shape", "view", "details")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and self.source.get("weights_sha256") == other.source.get("weights_sha256")

    def as_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, data: dict) -> "FieldSpec":
        known = {entry.name: data[entry.name] for entry in fields(cls)}
        return cls(**known | {"shape": tuple(data["shape"])})


def read_manifest(folder: str | Path, field: str) -> dict:
    """Return a finished field's manifest; raises `UserError` if it is missing, damaged or for another format, field, folder."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        state = "is not finished" if (path.parent / SETTINGS).exists() else "is not a cache"
        raise UserError(f"{folder} {state} (no {MANIFEST}): run the preprocessing script that writes it")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        wanted = f"format {FORMAT} version {VERSION}"
        raise UserError(f"{path} is not of {wanted}: run the preprocessing script again")
    if manifest.get("field") != field:
        raise UserError(f"{folder} holds {manifest.get('field')}, not {field}: check the paths")
    described = {entry.name for entry in fields(FieldSpec)}
    if lacking := (described | (TABLE_KEYS if field == "text" else SHARD_KEYS)) - manifest.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(lacking))}: run the preprocessing script again")
    if manifest["dtype"] not in list(ENCODINGS):
        raise UserError(f"{path} names an unknown dtype {manifest['dtype']!r}: update this code")
    shards, shape = manifest.get("shards", []), manifest["shape"]
    whole = isinstance(shape, list) and {type(size) for size in shape} <= {int} and isinstance(shards, list)
    if not whole or any(not isinstance(shard, dict) or shard.keys() != SHARD_ENTRY for shard in shards):
        raise UserError(f"{path} is damaged: delete it and run the preprocessing script again")
    if field != "text" and (path.parent / SETTINGS).exists():  # the manifest may be a copy from another cache
        settings = read_json(path.parent / SETTINGS)
        if other := [key for key in sorted(described) if settings.get(key) != manifest[key]]:
            raise UserError(
                f"{path} is not this folder's own (another {other[0]}): delete it and run the preprocessing script again"
            )
    return manifest


def ids_digest(ids: Iterable[str]) -> str:
    """Return the SHA-256 of a list of ids; their order matters."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def check_same(folder: Path, known: dict, wanted: dict) -> None:
    """Raise `UserError` where the `known` settings of a folder differ from the `wanted` ones."""
    for key, value in wanted.items():
        if known.get(key) != value:
            raise UserError(
                f"{folder} was written with another {key} ({known.get(key)!r} there, {value!r} here): choose another folder "
                "or delete that one"
            )


def read_json(path: Path) -> dict:
    """Read a JSON object; raises `UserError` when the file cannot be read or contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}): restore it, or delete {path.parent} and run the script that wrote it again"
        ) from None
    return content
