import os
import struct

import numpy as np
import pytest
from small_films import numbers, write_film, write_sound

from cache.clips import clip_frames, clip_info, read_clip
from cache.views import UnreadableImage
from common.errors import UserError


@pytest.mark.parametrize(
    ("start", "frames", "fps", "expected"),
    [
        (0, 5, 5, [0, 2, 4, 6, 8]),
        (0.7, 5, 10, [7, 8, 9, 10, 11]),
        (0.04, 3, 10, [0, 1, 2]),
        (0.06, 3, 10, [1, 2, 3]),
        (0, 5, 20, [0, 0, 1, 1, 2]),
        (0.1, 4, 3, [1, 4, 8, 11]),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.webm"])
def test_frames_are_those_nearest_in_time_in_every_container(tmp_path, name, start, frames, fps, expected):
    codec = {"avi": ("mpeg4", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p")}
    codec, pixels = codec.get(name[2:], ("libx264", "yuv420p"))
    write_film(tmp_path / name, codec=codec, pixels=pixels)
    assert numbers(read_clip(tmp_path / name, start, frames, fps, 16)) == expected


def test_varying_rates_count_by_time_and_not_by_index(tmp_path):
    times = [0, 0.1, 0.2, 0.9, 1.0, 1.1, 1.2, 1.3]
    film = write_film(tmp_path / "a.mp4", len(times), times=times)
    wanted = np.arange(7) / 5
    nearest = [int(np.abs(np.array(times) - t - 1e-9).argmin()) for t in wanted]
    assert numbers(read_clip(film, 0, 7, 5, 16)) == nearest == [0, 2, 2, 3, 3, 4, 6]


def test_a_seek_finds_what_reading_from_the_beginning_finds(tmp_path):
    film = write_film(tmp_path / "a.mp4", 24, options={"g": "5", "bf": "3"})
    for start in np.linspace(0, 1.9, 20):
        assert numbers(read_clip(film, start, 3, 10, 16)) == [round(start * 10 + i - 1e-6) for i in range(3)]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_film_is_made_upright(tmp_path, degrees):
    """An independent reference: the white quarter of the upper left, turned counterclockwise by numpy."""
    write_film(tmp_path / "plain.mov", 1, bright=True)
    film = write_film(tmp_path / "turned.mov", 1, bright=True, rotation=degrees)
    (plain,), (turned,) = clip_frames(tmp_path / "plain.mov", 0, 1, 1), clip_frames(film, 0, 1, 1)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(plain), degrees // 90))
    assert clip_info(film).size == turned.size


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    film = write_film(tmp_path / "a.mp4", 2, ratio="4/3", bright=True)
    (frame,) = clip_frames(film, 0, 1, 1)
    assert frame.size == clip_info(film).size == (43, 24)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "more"),
    [
        ("odd.webm", "libvpx-vp9", "yuv420p", {"size": (33, 47)}),
        ("alpha.webm", "libvpx-vp9", "yuva420p", {"alpha": True}),
        ("alpha.mov", "png", "rgba", {"alpha": True}),
        ("rows.mp4", "libx264", "yuv420p", {"options": {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}}),
        ("palette.gif", "gif", "rgb8", {"size": (64, 64)}),
        ("deep.mp4", "libx264", "yuv420p10le", {}),
    ],
)  # fmt: skip
def test_odd_films_are_read_as_rgb_without_alpha(tmp_path, name, codec, pixels, more):
    film = write_film(tmp_path / name, codec=codec, pixels=pixels, **more)
    clip = read_clip(film, 0, 5, 5, 16)
    assert (clip.shape, clip.dtype) == ((5, 16, 16, 3), np.uint8)
    assert numbers(clip) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("space", ["bt709", "bt470bg"])
@pytest.mark.parametrize("full", [True, False])
def test_colours_come_back_whatever_the_matrix_and_the_range(tmp_path, space, full):
    import av

    colour = np.array([200, 60, 30], np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        matrix, value = {"bt709": ("ITU709", 1), "bt470bg": ("ITU601", 5)}[space]
        stream.codec_context.colorspace, stream.codec_context.color_range = value, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (32, 32, 3)).copy(), format="rgb24")
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG"
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (clip,) = read_clip(tmp_path / "a.mp4", 0, 1, 1, 16)
    assert np.abs(clip.astype(int) - colour).max() <= 4


def test_the_info_of_a_film_says_what_fits(tmp_path):
    info = clip_info(write_film(tmp_path / "a.mp4", 17, rate=8))
    assert (info.duration, info.fps, info.frames, info.size) == (17 / 8, 8, 17, (32, 24))
    assert (info.windows(17, 8, 3), info.windows(17, 4, 1), info.windows(9, 8, 1)) == ([0], [], [0.5])
    assert info.windows(9, 8, 3) == [0, 0.5, 1]
    # Not more than there are beginnings.
    assert info.windows(16, 8, 9) == [0, 0.125]
    assert len(read_clip(tmp_path / "a.mp4", 0, 17, 8, 16)) == 17


def test_a_film_that_was_never_closed_has_a_duration(tmp_path):
    write_film(tmp_path / "a.mkv", 12, options={"g": "4"})
    data = (tmp_path / "a.mkv").read_bytes()
    at = data.index(b"\x44\x89")  # the duration's id; the rest says that the element is void
    (tmp_path / "b.mkv").write_bytes(data[:at] + b"\xec\x89" + data[at + 2 :])
    assert clip_info(tmp_path / "b.mkv").duration == pytest.approx(1.2)


def damaged(tmp_path):
    """{file name: its bytes}, of files that are no clip of ten frames."""
    good = write_film(tmp_path / "good.mp4", 20, options={"g": "4"}).read_bytes()
    huge = bytearray(write_film(tmp_path / "huge.avi", codec="rawvideo", pixels="bgr24").read_bytes())
    at = huge.index(b"strf") + 12
    huge[at : at + 8] = struct.pack("<ii", 60_000, 60_000)
    files = {
        "empty": b"",
        "text": b"a text" * 100,
        "begun": good[:40],
        "cut": good[: len(good) // 2],
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://" + str(tmp_path / "good.mp4").encode(),
        "concat": b"ffconcat version 1.0\nfile good.mp4\n",
        "short": write_film(tmp_path / "short.mp4", 5).read_bytes(),
        "sound": write_sound(tmp_path / "sound.mp4").read_bytes(),
        "frameless": write_film(tmp_path / "frameless.mov", 0).read_bytes(),
        "huge": bytes(huge),
        "ends": write_film(tmp_path / "x.mkv", 20, options={"g": "1", "qp": "0"}).read_bytes()[:-2600],
        "zeros": bytes(5000),
        "dot": write_film(tmp_path / "dot.mov", 20, size=(1, 1), codec="png", pixels="rgb24").read_bytes(),
    }  # fmt: skip
    return files


def test_what_is_no_clip_is_unreadable_and_says_why(tmp_path):
    for name, data in damaged(tmp_path).items():
        path = tmp_path / f"{name}.bad.mp4"
        path.write_bytes(data)
        with pytest.raises(UnreadableImage, match=f"{name}.bad.mp4: .") as error:
            read_clip(path, 0, 20, 10, 16)
        assert "\n" not in str(error.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo.mp4", tmp_path, tmp_path / "loop.mp4", tmp_path / "device.mp4"):
        with pytest.raises(UnreadableImage):
            read_clip(path, 0, 1, 1, 16)
        with pytest.raises(UnreadableImage):
            clip_info(path)
    with pytest.raises(UserError, match="mounted"):
        read_clip(tmp_path / "gone.mp4", 0, 1, 1, 16)
