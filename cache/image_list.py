"""The list of images that a cache or a training uses: a CSV with the columns `id, img_path, class_id, synset`."""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically

MAX_CLASSES = 2**31
COLUMNS = ["id", "img_path", "class_id", "synset"]


@dataclass(frozen=True)
class Sample:
    """One item, that is one row of the list. Every cached field uses `id` as its key; `class_id` counts from 0."""

    id: str
    img_path: str
    class_id: int
    synset: str


def read_samples(path: str | Path) -> list[Sample]:
    """Read the CSV of script 1; raises `UserError` when it is missing, empty or malformed, or contains an id twice."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise UserError(f"{path}: the columns must be {', '.join(COLUMNS)} (script 1 writes them)")
            samples = [
                Sample(row["id"], row["img_path"], int(row["class_id"]), row["synset"]) for row in reader
            ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with script 1") from None
    except (ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is damaged (a row is incomplete); make it again with script 1") from None
    if odd := [sample.id for sample in samples if not 0 <= sample.class_id < MAX_CLASSES]:
        raise UserError(f"{path} gives {odd[0]} a class_id that is none; classes count from 0")
    if odd := [sample.id for sample in samples if not sample.id or not sample.id.isprintable()]:
        raise UserError(f"{path} has the id {odd[0]!r}; ids are names without control characters")
    if not samples:
        raise UserError(f"{path} lists no images; make it again with script 1")
    if twice := [key for key, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise UserError(f"{path} names the id {twice[0]} twice; ids are keys and must be unique")
    return samples


def write_samples(path: str | Path, samples: list[Sample]) -> None:
    """Write the CSV atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *map(attrgetter(*COLUMNS), samples)])
    try:
        write_atomically(path, text.getvalue().encode())
    except UnicodeEncodeError as error:
        name = error.object[error.start - 40 : error.end]
        raise UserError(f"a file name is not UTF-8 ({name!r}): rename it") from None
