"""The two JSON files that describe a cached field: its settings and its manifest.

A field is a folder. The writer creates `settings.json` first, which records the specification that the folder is meant for,
and `manifest.json` last, which records what the folder contains. A folder without a manifest is unfinished, and readers refuse
it. `cache/shards.py` describes the whole format.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from pydantic import Field

from cache.encodings import ENCODINGS
from cache.field_spec import FORMAT, VERSION, FieldSpec, NamedField, Size, TextSpec
from common.errors import UserError
from common.files import write_json
from common.reading import JsonRecord, read_record
from common.sides import height_width, same_aspect, written

MANIFEST, SETTINGS, UNREADABLE = "manifest.json", "settings.json", "unreadable.csv"
UNREADABLE_COLUMNS = ("id", "shard", "problem")
FOLDER_AGAIN = "restore it, or delete the folder and run the script that wrote it again"
Count = Annotated[int, Field(ge=0)]
Rectangle = Annotated[list[Size], Field(min_length=2, max_length=2)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.lmdb$")]  # in the same folder
Template = Annotated[str, Field(pattern=r"\{class_name\}")]


class View(JsonRecord, total=False):
    """The crop that the model saw, of a clip the moments too; the text has none. Sides: one of a square, or [height, width]."""

    kind: str
    size: Size | Rectangle  # px
    patch: Size  # px
    grid: Size | Rectangle  # tokens
    crop: Rectangle  # of the shape that was cut, where it is not exactly that of `size`
    frames: Size  # of a clip
    fps: float
    latent_frames: Size  # that the tokens stand for, each seen by one frame or by the mean of several
    frames_of_teacher: Literal["middle", "mean"]


class ImageDetails(JsonRecord, total=False):
    """What only latents have."""

    posterior: Literal["mode", "sample", "moments"]
    scaled: bool
    # As they were written, for 1 and 1.0 have different seals; of --unscaled, where x_0 = (z - mean) * scaling_factor.
    scaling_factor: int | float | list[float]
    mean: int | float | list[float]
    size_and_crop: Literal[True]  # stored behind each value, see `FieldSpec.size_and_crop`


class TextDetails(JsonRecord):
    """What only the text has."""

    fields: dict[str, NamedField]
    # Fields cut behind the longest prompt, and the mask that says where that is.
    trimmed: NotRequired[dict[str, str]]
    # Tokens of a prompt, where they are fewer than the pipeline's own.
    max_sequence_length: NotRequired[Count]
    template: NotRequired[Template]  # of the prompts of classes


class Specification(JsonRecord):
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


class Settings(Specification):
    """settings.json of latents and tokens."""

    shard_size: Size


class TextSettings(Settings):
    """settings.json of the text."""

    field: Literal["text"]
    details: TextDetails


class ShardEntry(JsonRecord):
    """A finished shard."""

    file: ShardName
    count: Count
    bytes: Count
    checksum: Count


class ImageManifest(Specification):
    """manifest.json of latents and tokens."""

    num_samples: Count
    num_unreadable: Count
    ids_sha256: Sha256
    shards: list[ShardEntry]
    seal: Sha256


class TextManifest(ImageManifest):
    """manifest.json of the text."""

    field: Literal["text"]
    details: TextDetails
    num_prompts: Size  # of prompts.json, which may hold more by now
    prompts_sha256: Sha256  # of these


AnyManifest = Annotated[ImageManifest | TextManifest, Field(discriminator="field")]
AnySettings = Annotated[Settings | TextSettings, Field(discriminator="field")]


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
        for name in (entry.name for entry in fields(FieldSpec)):
            if settings[name] != manifest[name]:
                raise UserError(f"{path} is not this folder's own (another {name} than {SETTINGS}): {remedy}")
    return manifest


def read_settings(folder: Path) -> Settings:
    """Return what a field's folder is meant for."""
    return read_record(folder / SETTINGS, AnySettings, FOLDER_AGAIN)


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
    if len(shape) != (3 + ("frames" in view) if manifest["field"] == "latents" else 2):
        return f"a shape {shape} of {manifest['field']}"
    cells = view.get("latent_frames", 1) * prod(height_width(view.get("grid", 0)))
    return "shape and grid" if cells and shape[0] != cells else None


def crop_of(view: View) -> tuple[int, int]:
    """Return (height, width) of a rectangle of the shape that a view cuts out."""
    return height_width(view.get("crop", view["size"]))


def check_crops(latents: Path, seen: View, tokens: Path, by_teacher: View) -> None:
    """Raise `UserError` where the VAE and the teacher saw crops of different shapes."""
    if "size" in seen and "size" in by_teacher and not same_aspect(crop_of(seen), crop_of(by_teacher)):
        size = written(seen["size"])
        raise UserError(
            f"{tokens} were made of crops of {written(crop_of(by_teacher))}, {latents} of crops of {size}: run script 3 with "
            f"--size {size} and a --grid of that shape"
        )


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
