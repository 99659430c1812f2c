"""What a folder of images or films holds: the files, whether they have captions or classes, and the captions."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from cache.csv_file import csv_rows
from cache.image_list import LONGEST_PROMPT, one_line_prompt
from common.errors import UserError, one_line
from common.reading import parse_record, read_text

# The same extensions as in torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
METADATA = ("metadata.csv", "metadata.jsonl")  # as the imagefolder of the datasets library has them
FILM_TYPES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")
ROW = "give each file a row with its file_name and its text"


@dataclass(frozen=True)
class Kind:
    """What is listed: images, or films."""

    option: str  # of script 1
    noun: str
    extensions: tuple[str, ...]


IMAGES, FILMS = Kind("--images", "image", EXTENSIONS), Kind("--videos", "film", FILM_TYPES)


@with_config(ConfigDict(strict=True))
class CaptionRow(TypedDict):
    """A line of metadata.jsonl; its other keys are not used."""

    file_name: str
    text: str


def find_captions(folder: Path, kind: Kind = IMAGES) -> dict[str, str] | None:
    """Return the caption of each captioned image, or film, in and below a folder, by the file's name relative to it, sorted.

    They are those of metadata.csv or metadata.jsonl, or else of the .txt beside each image. Returns None where the images have
    no captions and lie in subfolders, which are then their classes. Says on stdout what it found, and on stderr which images
    without caption, captions without image, and empty captions it leaves out; raises `UserError` where no image is left.
    """
    if not folder.is_dir():
        raise UserError(f"{kind.option} {folder} is no folder: give the folder that holds the {kind.noun}s")
    files = files_below(folder, kind)
    images = [name for name in files if not name.lower().endswith(".txt")]
    texts = {os.path.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
    text_of = {name: texts[stem] for name in images if (stem := os.path.splitext(name)[0]) in texts}
    if metadata := [folder / name for name in METADATA if os.path.lexists(folder / name)]:
        if len(metadata) > 1:
            raise UserError(f"{folder} holds both {' and '.join(METADATA)}: move one of them away")
        print(f"{folder}: captions of {metadata[0].name}")
        captions = read_metadata(metadata[0])
        orphans = sorted(captions.keys() - set(images))
    elif text_of:
        print(f"{folder}: captions of the .txt beside each {kind.noun}")
        captions = {name: read_caption(folder / text) for name, text in text_of.items()}
        orphans = sorted(set(texts.values()) - set(text_of.values()))
    elif kind is IMAGES and any(os.sep in name for name in images):
        print(f"{folder}: no captions, so each folder is a class")
        return None
    else:
        raise UserError(
            f"{folder} holds {len(images)} {kind.noun}s and no captions: give it {' or '.join(METADATA)} (file_name, text), a "
            f".txt beside each {kind.noun}{', or a folder of images for each class' * (kind is IMAGES)}"
        )
    _say_left_out(folder, f"{kind.noun}s without caption", [name for name in images if name not in captions])
    _say_left_out(folder, f"captions without {kind.noun}", orphans)
    _say_left_out(folder, f"{kind.noun}s with an empty caption", [n for n in images if captions.get(n) == ""])
    found = {name: captions[name] for name in images if captions.get(name)}
    if not found:
        raise UserError(f"no {kind.noun} of {folder} has a caption: nothing is left to list")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """Return the captions of metadata.csv or metadata.jsonl by file name; raises `UserError` with the line that is wrong."""
    captions = {}
    for line, name, text in _csv_captions(path) if path.suffix == ".csv" else _jsonl_captions(path):
        where = f"line {line} of {path}"
        if not name or os.path.isabs(name) or ".." in name.split("/"):
            raise UserError(
                f"{where} has the file_name {name!r:.80}: names are relative to {path.parent}, without .."
            )
        if (name := os.path.normpath(name)) in captions:
            raise UserError(f"{where} names {name!r:.80} again: give each file one row")
        captions[name] = _checked_prompt(text, where)
    return captions


def _csv_captions(path: Path) -> Iterator[tuple[int, str, str]]:
    rows = csv_rows(path, ROW)
    _, header = next(rows, (1, []))
    for column in ("file_name", "text"):
        if header.count(column) != 1:
            raise UserError(f"{path} has {header.count(column)} columns {column}: {ROW}")
    for line, row in rows:
        yield line, row[header.index("file_name")], row[header.index("text")]


def _jsonl_captions(path: Path) -> Iterator[tuple[int, str, str]]:
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            row = parse_record(text, CaptionRow, f"line {line} of {path}", ROW)
            yield line, row["file_name"], row["text"]


def read_caption(path: Path) -> str:
    """Return the whole text of a file as one line."""
    return _checked_prompt(read_text(path, limit=16 * LONGEST_PROMPT), str(path))


def _checked_prompt(text: str, where: str) -> str:
    if len(prompt := one_line_prompt(text)) > LONGEST_PROMPT:
        raise UserError(
            f"{where} has a caption of {len(prompt):,} characters: {LONGEST_PROMPT:,} are allowed"
        )
    return prompt


def files_below(folder: Path, kind: Kind = IMAGES) -> list[str]:
    """Return the files of this kind and .txt files in and below a folder, relative to it, sorted, without hidden ones.

    Links to folders are followed, each folder once. Raises `UserError` for metadata in a subfolder alone.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        lists = [name for name in METADATA if name in names]
        if lists and not any(os.path.lexists(folder / name) for name in METADATA):
            raise UserError(f"{place} has the {lists[0]}, not {folder}: give {kind.option} {place}")
        inside = os.path.relpath(place, folder)
        found += (
            os.path.normpath(os.path.join(inside, name))
            for name in file_names(place, (*kind.extensions, ".txt"))
        )
    return sorted(found)


def file_names(folder: str | Path, extensions: Iterable[str] = EXTENSIONS) -> list[str]:
    """Return the files of a folder with these extensions, sorted, without hidden files (macOS writes ._*.JPEG).

    What has such a name and is no regular file, such as a FIFO, is reported on stderr and left out; none is opened.
    """
    with os.scandir(folder) as scan:
        shown = [entry for entry in scan if entry.name[0] != "."]
    named = [entry for entry in shown if os.path.splitext(entry.name)[1].lower() in extensions]
    files = sorted(entry.name for entry in named if _is_file(entry))
    if odd := sorted({entry.name for entry in named} - set(files)):
        print(one_line(f"{folder}: {few(odd)} left out, no regular file"), file=sys.stderr)
    return files


def _is_file(entry: os.DirEntry) -> bool:
    """Return whether an entry, or what it links to, is a regular file; the folder says that of all but links."""
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def few(names: list[str]) -> str:
    """Format up to three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _say_left_out(folder: Path, what: str, names: list[str]) -> None:
    if names:
        print(one_line(f"{folder}: {len(names)} {what} left out: {few(names)}"), file=sys.stderr)


def _raise(error: OSError) -> None:
    raise error
