"""Write clips as films that any player shows, and choose the frames that a picture shows."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cache.clips import EXACT
from common.files import file_written_whole

# A constant quality at which compression is hardly seen; metrics are to be taken of the clips, not of these files.
QUALITY = {"crf": "12", "preset": "medium"}
# As FFmpeg numbers the matrix, the primaries and the transfer of BT.709, and the range 16 to 235.
BT709, LIMITED = 1, 1


def write_film(path: str | Path, clip: np.ndarray, fps: float) -> None:
    """Write a clip, uint8 RGB `(F, H, W, 3)`, as an mp4 of H.264 in BT.709; the file is whole or absent.

    The format has even sides only: of an odd one the last row or column is repeated.
    """
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or not len(clip):
        raise ValueError(f"a clip is uint8 (F, H, W, 3), got {clip.dtype} {clip.shape}")
    height, width = clip.shape[1:3]
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with file_written_whole(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for picture in clip:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            to = {"format": "yuv420p", "dst_colorspace": BT709, "dst_color_range": LIMITED}
            container.mux(stream.encode(frame.reformat(**to, interpolation=EXACT)))
        container.mux(stream.encode())


def spread_frames(frames: int, columns: int) -> list[int]:
    """The numbers of `columns` frames, evenly spread from the first to the last; all where there are no more."""
    return np.linspace(0, frames - 1, min(columns, frames)).round().astype(int).tolist()
