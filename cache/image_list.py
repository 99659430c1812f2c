"""The list of images or clips of a cache or a training: a CSV `id, img_path, class_id, synset` or `id, img_path, prompt`.

The first kind has the class of each image, the second, a captioned list, its caption. The third, of clips, is
`id, img_path, start, fps, frames, prompt`: which moments of which film, and its caption. A list is of one kind.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from cache.csv_file import read_csv, write_csv
from common.errors import UserError

CLASS_ID, MAX_CLASSES = re.compile("[0-9]{1,10}"), 2**31
COLUMNS = ["id", "img_path", "class_id", "synset"]
CAPTIONED = ["id", "img_path", "prompt"]
CLIPS = ["id", "img_path", "start", "fps", "frames", "prompt"]
MAX_FRAMES, MAX_FPS = 10_000, 1000
BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")  # line breaks and control characters too
AGAIN = "make it again with script 1"
LONGEST_PROMPT = 10_000  # characters; text encoders read some hundreds


@dataclass(frozen=True)
class Sample:
    """One item, that is one row of the list. Every cached field uses `id` as its key; `class_id` counts from 0.

    In a captioned list `prompt` is the caption, `class_id` is None and `synset` empty; in a list of classes `prompt` is None.
    A clip is the `frames` frames of the film `img_path` at `start`, `start + 1 / fps`, … seconds; all three are None of images.
    """

    id: str
    img_path: str
    class_id: int | None = None
    synset: str = ""
    prompt: str | None = None
    start: float | None = None
    fps: float | None = None
    frames: int | None = None


def read_samples(path: str | Path) -> list[Sample]:
    """Read the CSV of script 1; raises `UserError` when it is missing, empty or malformed, or contains an id twice."""
    samples = []
    for line, (key, img_path, *rest) in read_csv(path, (COLUMNS, CAPTIONED, CLIPS), AGAIN):
        where = f"line {line} of {path} has"
        if len(rest) != 2:
            *moments, prompt = rest
            if not prompt or prompt != one_line_prompt(prompt) or len(prompt) > LONGEST_PROMPT:
                raise UserError(
                    f"{where} the prompt {prompt!r:.60}; a prompt is one line of text, of {LONGEST_PROMPT:,} characters at most"
                )
            about = {"prompt": prompt} | (_moments_of(*moments, where) if moments else {})
        else:
            class_id, synset = rest
            if not CLASS_ID.fullmatch(class_id) or int(class_id) >= MAX_CLASSES:
                raise UserError(f"{where} the class_id {class_id!r:.60}; classes are 0, 1, 2 …")
            about = {"class_id": int(class_id), "synset": synset}
        if not key or not key.isprintable():
            raise UserError(f"{where} the id {key!r:.60}, which is empty or has control characters")
        samples.append(Sample(key, img_path, **about))
    if not samples:
        raise UserError(f"{path} lists no images; {AGAIN}")
    clip_shape(samples)
    if twice := [key for key, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise UserError(f"{path} names the id {twice[0]} twice; ids are keys and must be unique")
    return samples


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write the CSV atomically; raises `UserError` for names of files that a CSV cannot hold."""
    columns = CLIPS if clip_shape(samples) else CAPTIONED if is_captioned(samples) else COLUMNS
    for sample in samples:
        shown = os.fsencode(sample.img_path).decode(errors="backslashreplace")
        if shown != sample.img_path:
            raise UserError(f"the file name {shown} is no UTF-8: rename that file")
        if not sample.id.isprintable():
            raise UserError(f"the file name {shown!r} has control characters: rename that file")
    write_csv(path, columns, map(attrgetter(*columns), samples))


def _moments_of(start: str, fps: str, frames: str, where: str) -> dict[str, float | int]:
    """Return the three numbers of a clip; raises `UserError` where one is none, or is out of range."""
    with suppress(ValueError):
        seconds, rate, count = float(start), float(fps), int(frames)
        if 0 <= seconds < math.inf and 0 < rate <= MAX_FPS and 0 < count <= MAX_FRAMES:
            return {"start": seconds, "fps": rate, "frames": count}
    raise UserError(
        f"{where} the clip {start!r:.40}, {fps!r:.40}, {frames!r:.40}: start is in seconds, fps 0 to {MAX_FPS} and "
        f"frames 1 to {MAX_FRAMES}"
    )


def clip_shape(samples: Sequence[Sample]) -> tuple[int, float] | None:
    """Return frames and fps of a list of clips, None of images; raises `UserError` where they are not the same in all rows."""
    shapes = {(sample.frames, sample.fps) for sample in samples}
    if len(shapes) > 1:
        raise UserError("the clips of a list must have the same frames and fps in all rows: make two lists")
    (shape,) = shapes or {(None, None)}
    return None if shape[0] is None else shape


def is_captioned(samples: Sequence[Sample]) -> bool:
    """Return whether a list has captions, and not classes; raises `UserError` where it mixes both."""
    kinds = {sample.prompt is not None for sample in samples}
    if len(kinds) > 1:
        raise UserError("a list has either captions or classes, not both: make two lists")
    return True in kinds


def one_line_prompt(text: str) -> str:
    """Return a caption as one line: white space and control characters become single blanks, none at either end."""
    return BLANKS.sub(" ", text).strip()


def different_prompts(samples: Sequence[Sample]) -> list[str]:
    """Return the prompts of a captioned list, each once, in the order of the list."""
    return list(dict.fromkeys(sample.prompt for sample in samples))
