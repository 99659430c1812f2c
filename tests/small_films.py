"""Small films of a known brightness: frame i of the file is grey of level 10 · i + 10."""

import fractions

import av
import numpy as np

from cache.clips import clip_frames, clip_info

LEVEL = 10


def write_film(path, pictures=12, *, size=(32, 24), rate=10, codec="libx264", pixels="yuv420p", alpha=False,
    times=None, rotation=0, options=None, bright=None, ratio=None):  # fmt: skip
    """Write a film of grey frames, or of `pictures (F, H, W, 3)`.

    `times` are the seconds of the frames of a film of varying rate. `bright` makes the upper left quarter white.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        if not isinstance(pictures, int):
            size = pictures.shape[2], pictures.shape[1]
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        if rotation:
            stream.set_display_rotation(rotation)
        if ratio:
            stream.codec_context.sample_aspect_ratio = fractions.Fraction(ratio)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = fractions.Fraction(1, 1000)
        for number in range(pictures if isinstance(pictures, int) else len(pictures)):
            if isinstance(pictures, int):
                picture = np.full((size[1], size[0], 3), LEVEL * (number + 1), np.uint8)
                if bright:
                    picture[: size[1] // 2, : size[0] // 2] = 255
            else:
                picture = pictures[number]
            if alpha:
                picture = np.concatenate([picture, np.full_like(picture[..., :1], 128)], axis=-1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if alpha else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if not pictures if isinstance(pictures, int) else False:
            container.start_encoding()
        container.mux(stream.encode())
    return path


def write_sound(path):
    """A file of a thousand samples of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(pixels):
    """The number in the file of each frame `(F, H, W, 3)`."""
    return [round((picture.mean() - LEVEL) / LEVEL) for picture in np.asarray(pixels, np.float64)]


def read_film(path):
    """All frames of a film, uint8 `(F, H, W, 3)`, and its rate."""
    info = clip_info(path)
    return np.stack(list(map(np.asarray, clip_frames(path, 0, info.frames, info.fps)))), info.fps
