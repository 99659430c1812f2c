"""The clips of a folder of films: which films are long enough, and the windows that are taken of each."""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cache.clips import ClipInfo, clip_info
from cache.image_list import Sample
from cache.views import UnreadableImage
from common.errors import UserError, one_line

THREADS = 8


def keep_usable(
    folder: Path, captions: Mapping[str, str], frames: int, fps: float
) -> tuple[dict[str, str], dict[str, ClipInfo]]:
    """Return the captions and the facts of the films that have `frames` at `fps`, by their names relative to the folder.

    Every other film is left out and said on stderr with its reason; raises `UserError` where none is left.
    """

    def look(name: str) -> ClipInfo | str:
        try:
            info = clip_info(folder / name)
        except UnreadableImage as error:
            return str(error)
        if info.windows(frames, fps, 1):
            return info
        return f"{folder / name}: {info.duration:.2f} s are too short for {frames} frames at {fps:g} a second"

    pool = ThreadPoolExecutor(THREADS)
    try:
        bar = tqdm(captions, desc="films", unit="film", disable=None)  # None: a bar only on a terminal
        found = dict(zip(bar, pool.map(look, captions), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    for problem in found.values():
        if isinstance(problem, str):
            print(one_line(f"left out {problem}"), file=sys.stderr)
    infos = {name: info for name, info in found.items() if not isinstance(info, str)}
    if not infos:
        raise UserError(
            f"{folder} has no film of {frames} frames at {fps:g} a second: ask for fewer, or for more a second"
        )
    return {name: captions[name] for name in infos}, infos


def cut_windows(
    films: Sequence[Sample], infos: Mapping[str, ClipInfo], names: Mapping[str, str], args
) -> list[Sample]:
    """Return the clips of films: `args.windows` evenly spread over each, fewer where they would begin within one frame.

    `names` are those of `infos` by ids. The id of a clip is that of its film and its beginning, so that it stays the same
    however many windows are asked for.
    """
    return [
        replace(film, id=f"{film.id}@{start:.3f}", start=start, fps=args.fps, frames=args.frames)
        for film in films
        for start in infos[names[film.id]].windows(args.frames, args.fps, args.windows)
    ]
