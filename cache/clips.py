"""Read the frames of a clip: so many, so many a second, from a start on, upright and without alpha.

    for frame in clip_frames("a.mp4", start=1.5, frames=17, fps=8.0): ...     # PIL images, full size
    pixels = read_clip("a.mp4", start=1.5, frames=17, fps=8.0, size=256)      # uint8 (17, 256, 256, 3)

The rate is constant in time: of a file of another rate, or of a varying one, each wanted moment takes the frame whose own time
is nearest. Only the frames between the first and the last moment are decoded, and two are in memory at a time.
"""

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from cache.views import UnreadableImage, check_memory, cut_view
from common.errors import UserError
from common.sides import Sides

# Playlists would open other files and addresses, and raw formats take any bytes for a film.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,gif,ogg"
LEAST_SIDE = 16  # px
# Conversion between colour spaces that rounds; FFmpeg's default is faster and darkens a picture by more than a level of 255.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
DAMAGE = (av.FFmpegError, ValueError, OverflowError, ZeroDivisionError, MemoryError)
COVER = av.stream.Disposition.attached_pic  # the picture of a song
# Maps the degrees, counterclockwise, by which a film is to be turned, to what PIL calls that.
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class ClipInfo:
    """What a file says of itself; `frames` is counted by the file or estimated from its duration and rate."""

    duration: float  # s
    fps: float
    size: tuple[int, int]  # width and height, upright
    frames: int

    def windows(self, frames: int, fps: float, count: int) -> list[float]:
        """Return when `count` windows of `frames` at `fps` begin, in seconds, spread evenly over the film; one is central.

        There are fewer where they would begin less than 1 / fps apart, and none where the film is too short.
        """
        latest = self.duration - 1 / self.fps - (frames - 1) / fps
        if latest < -0.5 / self.fps:
            return []
        latest = max(0.0, math.floor(latest * 1000 + 1e-6) / 1000)
        count = min(count, 1 + int(latest * fps + 1e-6))
        if count == 1:
            return [round(latest / 2, 3)]
        return [round(latest * number / (count - 1), 3) for number in range(count)]


def clip_info(path: str | Path) -> ClipInfo:
    """Return what a file says of itself, of which one frame is decoded; raises what `clip_frames` raises."""
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not 0 < rate < 10_000:
            raise ValueError(f"a rate of {rate:g} frames a second")
        first = next(_decoded(container, stream), None)
        if first is None:
            raise ValueError("no frame in it")
        duration = stream.duration and float(stream.duration * stream.time_base)
        if not duration and container.duration:
            duration = container.duration / av.time_base
        if not duration:  # a film that was never closed: its packets are read, not decoded
            times = (packet.pts for packet in container.demux(stream) if packet.pts is not None)
            last = max(times, default=first.pts)
            duration = float((last - _origin(stream)) * stream.time_base) + 1 / rate
        size = _upright(first, stream).size
        return ClipInfo(duration, rate, size, stream.frames or round(duration * rate))


def read_clip(
    path: str | Path, start: float, frames: int, fps: float, size: Sides, view: str = "aligned"
) -> np.ndarray:
    """Return the given view of the frames, uint8 RGB `(frames, height, width, 3)`; raises what `clip_frames` raises."""
    cuts = (np.asarray(cut_view(frame, size, view)) for frame in clip_frames(path, start, frames, fps))
    return np.stack(list(cuts))


def clip_frames(path: str | Path, start: float, frames: int, fps: float) -> Iterator[Image.Image]:
    """Yield the frames nearest to `start`, `start + 1 / fps`, …, upright RGB with square pixels, in full size.

    Times are in seconds and count from the first frame of the file. Raises `UnreadableImage` where the file is no film, is
    damaged or truncated, or ends before the last frame, and `UserError` when the file system cannot read it.
    """
    with _opened(path) as (container, stream):
        wanted = [start + number / fps for number in range(frames)]
        timed = _timed(container, stream, start)
        before, now = None, next(timed, None)
        too_late = now is None or now[0] > start
        if start > 0 and too_late:  # an index that leads too far: read from the beginning
            timed = _timed(container, stream, 0)
            now = next(timed, None)
        for moment in wanted:
            while now is not None and now[0] < moment:
                before, now = now, next(timed, None)
            if now is None and (before is None or moment > before[0] + _length(before[1], stream)):
                end = 0.0 if before is None else before[0]
                raise ValueError(f"its last frame is at {end:.3f} s, and one at {moment:.3f} s was asked for")
            nearest = now
            if now is None or (before is not None and moment - before[0] <= now[0] - moment):
                nearest = before
            yield _upright(nearest[1], stream)


@contextmanager
def _opened(path: str | Path):
    """Open a film for reading and yield its container and its first video stream; all damage becomes `UnreadableImage`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for its writer
            raise UnreadableImage(f"{path}: not a regular file")
        with open(path, "rb") as file:
            only = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
            with av.open(file, container_options=only, metadata_errors="replace") as container:
                films = (s for s in container.streams.video if not s.disposition & COVER)
                if (stream := next(films, None)) is None:
                    raise ValueError("no video stream in it")
                if stream.codec_context is None:
                    raise ValueError("its video is of an unknown codec")
                check_memory(stream.codec_context.width, stream.codec_context.height)
                stream.codec_context.thread_count = 1  # clips are decoded by several processes
                yield container, stream
    except DAMAGE as error:
        if isinstance(error, UnreadableImage):
            raise
        why = f"no readable film ({error.strerror})" if isinstance(error, av.FFmpegError) else str(error)
        raise UnreadableImage(f"{path}: {' '.join(why.split()) or 'damaged'}") from None
    except OSError as error:
        # FFmpeg seeks to before the beginning of some damaged files, which is EINVAL.
        if why := {errno.ELOOP: "a loop of links", errno.EINVAL: "no readable film"}.get(error.errno):
            raise UnreadableImage(f"{path}: {why}") from None
        todo = "is the disk still mounted? The same command goes on from here"
        raise UserError(f"cannot read {path}: {error.strerror}; {todo}") from None


def _timed(container, stream, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield times and frames in the order of showing, from the last key frame before `start` on."""
    offset = _origin(stream) + int(start / stream.time_base)
    container.seek(offset if start else min(0, offset), stream=stream, backward=True)
    for frame in _decoded(container, stream):
        yield float((frame.pts - _origin(stream)) * stream.time_base), frame


def _decoded(container, stream) -> Iterator[av.VideoFrame]:
    """Yield the frames that have a time, in the order of showing."""
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ValueError(f"damaged at {float(frame.time or 0):.3f} s")
        if frame.pts is not None:
            yield frame


def _origin(stream) -> int:
    return stream.start_time or 0


def _length(frame: av.VideoFrame, stream) -> float:
    """The seconds that a frame is shown."""
    length = float((frame.duration or 0) * stream.time_base)
    return length or 1 / float(stream.average_rate or stream.guessed_rate or 1)


def _upright(frame: av.VideoFrame, stream) -> Image.Image:
    """Return a frame as RGB, its pixels made square and turned as the file says."""
    ratio = float(stream.sample_aspect_ratio or 1)
    width = max(1, round(frame.width * ratio)) if ratio > 0 else frame.width
    check_memory(max(width, frame.width), frame.height)
    if min(frame.width, frame.height) < LEAST_SIDE:
        raise ValueError(f"{frame.width} × {frame.height} pixels, and {LEAST_SIDE} are the least")
    image = frame.to_image(interpolation=EXACT)
    if width != frame.width:
        image = image.resize((width, frame.height), Image.Resampling.BICUBIC)
    turn = TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
