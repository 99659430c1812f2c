"""Films from a folder to a list of clips."""

import csv
import os

import pytest
from conftest import run_numbered
from small_films import numbers, write_film, write_sound

from cache.clips import read_clip
from cache.image_list import CLIPS, Sample, read_samples, write_samples
from common.errors import UserError


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    (folder / "sub").mkdir(parents=True)
    write_film(folder / "a.mp4", 24)
    write_film(folder / "sub/b.webm", 20, codec="libvpx-vp9")
    write_film(folder / "short.mov", 9)
    for name in ("a", "sub/b", "short"):
        (folder / f"{name}.txt").write_text(f"the film {name}")
    return folder


def listed(folder, *more, frames=9, fps=5):
    out = folder.parent / "list.csv"
    arguments = ["--videos", folder, "--out", out, "--frames", frames, "--fps", fps, *more]
    run_numbered("1_sample_imagenet_subset", *arguments)
    return read_samples(out)


def test_each_film_gives_windows_that_can_be_read_and_short_ones_are_named(films, capsys):
    samples = listed(films, "--windows", 3)
    starts = {name: [s.start for s in samples if s.prompt == f"the film {name}"] for name in ("a", "sub/b")}
    assert starts == {"a": [0, 0.35, 0.7], "sub/b": [0, 0.3]}
    assert {s.id for s in samples} >= {"a@0.000", "a@0.350", "sub/b@0.300"}
    assert {(s.frames, s.fps) for s in samples} == {(9, 5.0)}
    for sample in samples:
        clip = read_clip(sample.img_path, sample.start, sample.frames, sample.fps, 16)
        wanted = [sample.start * 10 + 2 * i for i in range(9)]
        assert all(abs(a - b) <= 0.51 for a, b in zip(numbers(clip), wanted, strict=True))
    assert "short.mov: 0.90 s are too short for 9 frames at 5 a second" in capsys.readouterr().err
    with open(films.parent / "list.csv") as file:
        assert next(csv.reader(file)) == CLIPS


def test_one_window_is_central_and_its_id_does_not_depend_on_how_many_there_are(films):
    one = {s.id for s in listed(films)}
    assert one == {"a@0.350", "sub/b@0.150"}
    assert "a@0.350" in {s.id for s in listed(films, "--windows", 3)}


def test_films_are_held_out_whole(films):
    out = films.parent / "val.csv"
    train = listed(films, "--windows", 3, "--hold-out", 1, "--hold-out-csv", out)
    held = read_samples(out)
    assert len({s.img_path for s in held}) == len({s.img_path for s in train}) == 1
    assert not {s.img_path for s in held} & {s.img_path for s in train}
    again = listed(films, "--windows", 1, "--hold-out", 1, "--hold-out-csv", out)
    assert {s.img_path for s in again} == {s.img_path for s in train}


def test_metadata_captions_films_too(films):
    (films / "metadata.jsonl").write_text('{"file_name": "sub/b.webm", "text": "a  sea"}\n')
    assert [(s.id, s.prompt) for s in listed(films)] == [("sub/b@0.150", "a sea")]


def test_bad_films_are_left_out_each_with_its_reason(films, capsys):
    good = (films / "a.mp4").read_bytes()
    bad = {
        "empty.mp4": b"",
        "text.mkv": b"no film" * 99,
        "cut.mp4": good[: len(good) // 2],
        "list.ts": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
        "sound.mp4": write_sound(films / "sound.mp4").read_bytes(),
        "none.mov": write_film(films / "none.mov", 0).read_bytes(),
    }
    for name, data in bad.items():
        (films / name).write_bytes(data)
    (films / "gone.mp4").symlink_to("nowhere")
    (films / "folder.mp4").mkdir()
    os.mkfifo(films / "fifo.mp4")
    for name in (*bad, "gone.mp4", "fifo.mp4", "folder.mp4"):
        (films / name).with_suffix(".txt").write_text("a caption")
    assert {s.id for s in listed(films)} == {"a@0.350", "sub/b@0.150"}
    lines = capsys.readouterr().err.splitlines()
    for name in bad:
        assert sum(f"/{name}: " in line for line in lines) == 1, name
    assert any("fifo.mp4" in line and "no regular file" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--frames", 16, "--fps", 8], "use 13 or 17"),
        (["--frames", 17], "--fps"),
        (["--fps", 8], "--frames"),
        (["--frames", 9, "--fps", 5, "--per-class", 3], "--per-class is for images"),
        (["--frames", 17, "--fps", 0.5], "no film of 17 frames"),
        (["--frames", 9, "--fps", 5, "--count", 2, "--hold-out", 1, "--hold-out-csv", "x.csv"], "captioned films, fewer"),
    ],
)  # fmt: skip
def test_what_cannot_be_listed_is_one_line(films, options, says):
    with pytest.raises(UserError, match=says):
        run_numbered(
            "1_sample_imagenet_subset", "--videos", films, "--out", films.parent / "list.csv", *options
        )
    assert not (films.parent / "list.csv").exists()


def test_films_without_captions_are_refused_and_classes_are_for_images(films):
    for text in films.rglob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match=r"3 films and no captions: .* \.txt beside each film$"):
        listed(films)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a,x.mp4,0,8,17,", "prompt"),
        ("a,x.mp4,-1,8,17,p", "seconds"),
        ("a,x.mp4,nan,8,17,p", "seconds"),
        ("a,x.mp4,0,0,17,p", "fps"),
        ("a,x.mp4,0,inf,17,p", "fps"),
        ("a,x.mp4,0,8,0,p", "frames"),
        ("a,x.mp4,0,8,1e3,p", "frames"),
        ("a,x.mp4,0,8,99999999999,p", "frames"),
        ("b,x.mp4,0,8,17,p\na,x.mp4,0,8,13,p", "same frames"),
        ("b,x.mp4,0,9,17,p\na,x.mp4,0,8,17,p", "same frames"),
        ("b,x.mp4,0,8,17,p\nb,x.mp4,1,8,17,p", "twice"),
    ],
)
def test_a_list_of_clips_that_makes_no_sense_is_refused(tmp_path, row, says):
    (tmp_path / "list.csv").write_text(f"{','.join(CLIPS)}\n{row}\n")
    with pytest.raises(UserError, match=says):
        read_samples(tmp_path / "list.csv")


def test_a_list_of_clips_comes_back_as_it_was_written(tmp_path):
    samples = [Sample(f"a@{s}", "é.mp4", prompt="a, b", start=s, fps=23.976, frames=17) for s in (0.0, 1.234)]
    write_samples(tmp_path / "list.csv", samples)
    assert read_samples(tmp_path / "list.csv") == samples
