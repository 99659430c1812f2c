"""What the values of a field are, and how they are stored as bytes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from cache.encodings import ENCODINGS
from common.reading import JsonRecord

FORMAT, VERSION = "urepa-cache", 3
CROP_BYTES = 6 * 4  # six numbers in int32
Size = Annotated[int, Field(ge=1, lt=2**31)]


class NamedField(JsonRecord):
    """One of the named fields of the text."""

    shape: list[Size]  # of one prompt
    dtype: Literal["float16", "bfloat16", "float32", "uint8"]  # masks are uint8


@dataclass(frozen=True)
class FieldSpec:
    """The specification of a field. The manifest records every attribute, and reading fails where one is missing."""

    field: str  # latents, tokens or text
    shape: tuple[int, ...]  # of one value, without a batch dimension
    dtype: str  # as stored, a key of ENCODINGS; numbers are little-endian
    meaning: str  # what a value is, in words
    # The model that made the values: its id, its revision, the digest of its weights, the precision it ran in.
    source: dict = field(default_factory=dict)
    view: dict = field(default_factory=dict)  # the crop that the model saw: kind, size in px, token grid
    details: dict = field(default_factory=dict)  # what only this field needs, such as a scaling factor

    @property
    def value_bytes(self) -> int:
        """The number of bytes of one stored value."""
        return ENCODINGS[self.dtype].value_bytes(self.shape) + ("size_and_crop" in self.details) * CROP_BYTES

    def encode(self, values: Tensor, size_and_crop: Tensor | None = None) -> Tensor:
        """Encode `values (n, *shape)` to the bytes that are stored, uint8 `(n, value_bytes)`, on the same device."""
        if values.shape[1:] != self.shape:
            raise ValueError(f"{self.field}: expected (n, *{self.shape}), got {tuple(values.shape)}")
        raw = ENCODINGS[self.dtype].encode(values)
        if "size_and_crop" not in self.details:
            return raw
        return torch.cat([raw, size_and_crop.to(raw.device, torch.int32).view(torch.uint8)], dim=1)

    def size_and_crop(self, raw: Tensor) -> Tensor | None:
        """Return what `cache.views.size_and_crop` found, fp32 `(n, 6)`, of bytes `(n, value_bytes)`; None if not stored."""
        stored = "size_and_crop" in self.details
        return raw[:, -CROP_BYTES:].clone().view(torch.int32).float() if stored else None

    def decode(self, raw: Tensor) -> Tensor:
        """Decode bytes `raw (n, value_bytes)` to values `(n, *shape)` on the same device, if possible as a view of `raw`."""
        end = raw.shape[1] - ("size_and_crop" in self.details) * CROP_BYTES
        return ENCODINGS[self.dtype].decode(raw[:, :end], self.shape)

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
