"""The list of images that a cache or a training uses: a CSV with the columns `id, img_path, class_id, synset`."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from cache.csv_file import read_csv, write_csv
from common.errors import UserError

CLASS_ID, MAX_CLASSES = re.compile("[0-9]{1,10}"), 2**31
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
    samples = []
    for line, (key, img_path, class_id, synset) in read_csv(path, COLUMNS, "make it again with script 1"):
        if not CLASS_ID.fullmatch(class_id) or int(class_id) >= MAX_CLASSES:
            raise UserError(f"line {line} of {path} has the class_id {class_id!r:.60}; classes are 0, 1, 2 …")
        if not key or not key.isprintable():
            raise UserError(
                f"line {line} of {path} has the id {key!r:.60}, which is empty or has control characters"
            )
        samples.append(Sample(key, img_path, int(class_id), synset))
    if not samples:
        raise UserError(f"{path} lists no images; make it again with script 1")
    if twice := [key for key, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise UserError(f"{path} names the id {twice[0]} twice; ids are keys and must be unique")
    return samples


def write_samples(path: str | Path, samples: list[Sample]) -> None:
    """Write the CSV atomically."""
    for name in (sample.img_path for sample in samples):
        if (shown := os.fsencode(name).decode(errors="backslashreplace")) != name:
            raise UserError(f"the file name {shown} is no UTF-8: rename that file")
    write_csv(path, COLUMNS, map(attrgetter(*COLUMNS), samples))
