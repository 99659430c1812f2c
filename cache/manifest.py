"""What a cached field says of itself: its specification and its manifest.

A field is a folder. `settings.json` is written first and says what the folder is for; `manifest.json` is written last and
says what it holds. Whoever reads a field insists on its manifest. The format as a whole: `cache/shards.py`.
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
SHARD_ENTRY = {"file", "count", "bytes", "checksum"}  # of each of `shards`


@dataclass(frozen=True)
class FieldSpec:
    """What one field holds. All of it is recorded in the manifest, and a reader insists on it.

    `dtype` is a key of `ENCODINGS`; numbers are little-endian. `source` names the model (id, revision, digest of its weights,
    precision it ran in); `view` says which pixels it saw (kind, size in px, grid); `details` holds what is particular to
    the field, such as the VAE's scaling factor.
    """

    field: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str
    source: dict = field(default_factory=dict)
    view: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored value."""
        return ENCODINGS[self.dtype].value_bytes(self.shape)

    def encode(self, values: Tensor) -> Tensor:
        """What is stored of `values (n, *shape)`: uint8 `(n, value_bytes)` on the same device."""
        if values.shape[1:] != self.shape:
            raise ValueError(f"{self.field}: expected (n, *{self.shape}), got {tuple(values.shape)}")
        return ENCODINGS[self.dtype].encode(values)

    def decode(self, raw: Tensor) -> Tensor:
        """Values `(n, *shape)` of stored bytes `raw (n, value_bytes)`, on the same device; a view of them where possible."""
        return ENCODINGS[self.dtype].decode(raw, self.shape)

    def agrees_with(self, other: "FieldSpec") -> bool:
        """Whether both hold values of the same kind: field, shape, view, details and the weights that made them."""

        def kind(spec: FieldSpec):
            return spec.field, spec.shape, spec.view, spec.details, spec.source.get("weights_sha256")

        return kind(self) == kind(other)

    def as_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, data: dict) -> "FieldSpec":
        names = ("field", "shape", "dtype", "meaning", "source", "view", "details")
        return cls(**{name: tuple(data[name]) if name == "shape" else data[name] for name in names})


def read_manifest(folder: str | Path, field: str) -> dict:
    """The manifest of a finished field; raises `UserError` when there is none, or it is of another format or field."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        state = "is not finished" if (path.parent / SETTINGS).exists() else "is not a cache"
        raise UserError(f"{folder} {state} (no {MANIFEST}): run the preprocessing script that writes it")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(
            f"{path} is not of format {FORMAT} version {VERSION}: run the preprocessing script again"
        )
    if manifest.get("field") != field:
        raise UserError(f"{folder} holds {manifest.get('field')}, not {field}: check the paths")
    described = {entry.name for entry in fields(FieldSpec)}
    if lacking := (described | (TABLE_KEYS if field == "text" else SHARD_KEYS)) - manifest.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(lacking))}: run the preprocessing script again")
    if manifest["dtype"] not in list(ENCODINGS):
        raise UserError(f"{path} names an unknown dtype {manifest['dtype']!r}: update this code")
    shards, shape = manifest.get("shards", []), manifest["shape"]
    whole = (
        isinstance(shape, list) and all(isinstance(size, int) for size in shape) and isinstance(shards, list)
    )
    if not whole or any(not isinstance(shard, dict) or shard.keys() != SHARD_ENTRY for shard in shards):
        raise UserError(f"{path} is damaged: delete it and run the preprocessing script again")
    if field != "text" and (path.parent / SETTINGS).exists():  # of another cache, put here
        settings = read_json(path.parent / SETTINGS)
        if other := [key for key in sorted(described) if settings.get(key) != manifest[key]]:
            raise UserError(
                f"{path} is not this folder's own (another {other[0]}): delete it and run the preprocessing script again"
            )
    return manifest


def ids_digest(ids: Iterable[str]) -> str:
    """A digest of a list of ids in this order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def check_same(folder: Path, known: dict, wanted: dict) -> None:
    """Raise `UserError` unless a folder's settings are those that are wanted."""
    for key, value in wanted.items():
        if known.get(key) != value:
            raise UserError(
                f"{folder} was written with another {key} ({known.get(key)!r} there, {value!r} here): choose another folder "
                "or delete that one"
            )


def read_json(path: Path) -> dict:
    """A JSON object; `UserError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}): restore it, or delete {path.parent} and run the script that wrote it again"
        ) from None
    return content
