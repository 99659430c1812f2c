"""Clips as files: what is written can be read, by this project and by OpenCV."""

import cv2
import numpy as np
import pytest
from scipy import ndimage
from small_films import read_film

from cache.films import write_film


def clip(frames=9, height=48, width=64):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(frames, height, width, 3)), (1, 4, 4, 0))
    return ((noise / np.abs(noise).max() + 1) * 127).astype(np.uint8)


@pytest.mark.parametrize("fps", [8, 24, 23.976])
def test_a_film_comes_back_frame_by_frame_at_its_rate(tmp_path, fps):
    written = clip()
    write_film(tmp_path / "a.mp4", written, fps)
    read, rate = read_film(tmp_path / "a.mp4")
    assert read.shape == written.shape
    assert rate == pytest.approx(fps, rel=1e-4)
    errors = np.abs(read.astype(float) - written)
    assert errors.mean() < 4
    # FFmpeg's default conversion would darken by one level and more.
    assert np.abs((read.astype(float) - written).mean((0, 1, 2))).max() < 0.3
    # Each frame is nearer to itself than to its neighbours.
    for i, frame in enumerate(read):
        assert np.abs(written.astype(float) - frame).mean((1, 2, 3)).argmin() == i


def test_colours_are_what_another_decoder_reads_too(tmp_path):
    colour = np.array([210, 50, 30], np.uint8)
    write_film(tmp_path / "a.mp4", np.broadcast_to(colour, (4, 32, 32, 3)).copy(), 8)
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    good, frame = film.read()
    assert good
    assert np.abs(frame[16, 16, ::-1].astype(int) - colour).max() <= 4
    assert np.abs(read_film(tmp_path / "a.mp4")[0][0, 16, 16].astype(int) - colour).max() <= 4


def test_odd_sides_become_even_by_one_repeated_line(tmp_path):
    write_film(tmp_path / "a.mp4", clip(3, 33, 47), 8)
    read, _ = read_film(tmp_path / "a.mp4")
    assert read.shape == (3, 34, 48, 3)
    assert np.abs(read[:, :33, :47].astype(float) - clip(3, 33, 47)).mean() < 3


def test_what_is_no_clip_is_refused_and_leaves_no_file(tmp_path):
    for wrong in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3))):
        with pytest.raises(ValueError, match="a clip is"):
            write_film(tmp_path / "a.mp4", wrong, 8)
    assert not list(tmp_path.iterdir())
