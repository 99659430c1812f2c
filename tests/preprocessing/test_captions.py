"""Script 1 on a folder of one's own: which kind it is, what is paired, what is left out, and what is kept apart."""

import csv
import json
import os

import pytest
from conftest import image_tree, run_numbered
from PIL import Image

from cache.image_list import CAPTIONED, Sample, is_captioned, read_samples, write_samples
from common.errors import UserError


def images(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (i, i, i)).save(path)


def metadata(folder, rows, kind="csv"):
    folder.mkdir(exist_ok=True)
    with open(folder / f"metadata.{kind}", "w", newline="", encoding="utf-8") as file:
        if kind == "csv":
            csv.writer(file).writerows([("file_name", "text"), *rows])
        else:
            file.writelines(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)


def listed(folder, *more):
    out = folder.parent / "list.csv"
    run_numbered("1_sample_imagenet_subset", "--images", folder, "--out", out, *more)
    return read_samples(out)


def prompts(samples):
    return {sample.id: sample.prompt for sample in samples}


@pytest.fixture
def photos(tmp_path):
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_is_paired_with_its_images_by_name(photos, capsys, kind):
    images(photos, "a.png", "sub/b.JPG")
    metadata(photos, [("./sub/b.JPG", "a  dog,\n\x07running"), ("a.png", "é “cat”")], kind)
    samples = listed(photos)
    assert prompts(samples) == {"a": "é “cat”", "sub/b": "a dog, running"}
    assert {s.img_path for s in samples} == {str(photos / "a.png"), str(photos / "sub/b.JPG")}
    assert {(s.class_id, s.synset) for s in samples} == {(None, "")}
    assert f"captions of metadata.{kind}" in capsys.readouterr().out
    with open(photos.parent / "list.csv") as file:
        assert next(csv.reader(file)) == CAPTIONED == ["id", "img_path", "prompt"]


def test_columns_may_stand_in_any_order_beside_others_and_marks_and_line_ends_do_not_matter(photos):
    images(photos, "a.png", "b.png")
    (photos / "metadata.csv").write_bytes(b"\xef\xbb\xbfn,text,file_name\r\n1,x,a.png\r\n\r\n2,y,b.png\r\n")
    assert prompts(listed(photos)) == {"a": "x", "b": "y"}
    (photos / "metadata.csv").unlink()
    lines = b'\xef\xbb\xbf{"file_name": "a.png", "n": [1], "text": "x"}\r\n\r\n{"text": "y", "file_name": "b.png"}'
    (photos / "metadata.jsonl").write_bytes(lines)
    assert prompts(listed(photos)) == {"a": "x", "b": "y"}


def test_a_text_beside_each_image_is_its_caption_as_a_whole(photos, capsys):
    images(photos, "a.png", "sub/b.webp")
    (photos / "a.TXT").write_text("\ufeffone\r\n\ttwo \n", encoding="utf-8")
    (photos / "sub/b.txt").write_text("three")
    assert prompts(listed(photos)) == {"a": "one two", "sub/b": "three"}
    assert "captions of the .txt beside each image" in capsys.readouterr().out


def test_folders_of_images_without_captions_are_classes(photos, capsys):
    image_tree(photos.parent, {"cat": 4, "ant": 3}, split="photos")
    (photos / "cat/readme.txt").write_text("no caption")
    samples = listed(photos, "--per-class", 2, "--hold-out", 1, "--hold-out-csv", photos.parent / "val.csv")
    held_out = read_samples(photos.parent / "val.csv")
    assert [(s.class_id, s.synset) for s in samples] == [(0, "ant"), (1, "cat")] * 2
    assert [(s.class_id, s.synset) for s in held_out] == [(0, "ant"), (1, "cat")]
    assert not {s.id for s in samples} & {s.id for s in held_out}
    assert "each folder is a class" in capsys.readouterr().out


def test_what_has_no_other_half_is_named_counted_and_left_out(photos, capsys):
    images(photos, "a.png", "b.png", "c.png", "d.png")
    metadata(photos, [("a.png", "x"), ("gone.png", "y"), ("b.png", " \n")])
    (photos / "e.png").mkdir()
    os.mkfifo(photos / "f.png")
    images(photos, ".hidden/g.png")
    assert prompts(listed(photos)) == {"a": "x"}
    said = capsys.readouterr().err
    assert "2 images without caption left out: c.png, d.png" in said
    assert "1 captions without image left out: gone.png" in said
    assert "1 images with an empty caption left out: b.png" in said
    assert "e.png, f.png left out, no regular file" in said


def test_orphans_of_texts_are_named_too(photos, capsys):
    images(photos, "a.png", "b.png")
    for name in ("a", "notes"):
        (photos / f"{name}.txt").write_text("x")
    assert prompts(listed(photos)) == {"a": "x"}
    said = capsys.readouterr().err
    assert "1 images without caption left out: b.png" in said
    assert "1 captions without image left out: notes.txt" in said


def test_links_to_folders_are_followed_once(photos):
    images(photos.parent, "elsewhere/a.png")
    (photos.parent / "elsewhere/a.txt").write_text("x")
    photos.mkdir()
    (photos / "link").symlink_to(photos.parent / "elsewhere")
    (photos.parent / "elsewhere/back").symlink_to(photos)
    assert prompts(listed(photos)) == {"link/a": "x"}


class TestHeldOut:
    @pytest.fixture
    def many(self, photos):
        images(photos, *(f"{i}.png" for i in range(12)))
        metadata(photos, [(f"{i}.png", f"number {i % 5}") for i in range(12)])
        return photos

    def test_the_rest_is_trained_on_and_a_shorter_list_begins_the_longer(self, many, capsys):
        val = many.parent / "val.csv"
        whole = listed(many, "--hold-out", 3, "--hold-out-csv", val)
        held_out = read_samples(val)
        assert "9 captioned images" in capsys.readouterr().out
        assert (len(whole), len(held_out)) == (9, 3)
        assert not {s.id for s in whole} & {s.id for s in held_out}
        assert listed(many, "--count", 4, "--hold-out", 3, "--hold-out-csv", val) == whole[:4]
        assert read_samples(val) == held_out
        assert listed(many, "--count", 4) == whole[:4]
        assert [s.id for s in listed(many, "--seed", 1)] != [s.id for s in listed(many)]

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--count", 13], "12 captioned images, fewer than --count 13"),
            (["--count", 10, "--hold-out", 3, "--hold-out-csv", "v.csv"], "--count 10 and --hold-out 3"),
            (
                ["--hold-out", 12, "--hold-out-csv", "v.csv"],
                "fewer than an image to train on and --hold-out 12",
            ),
            (["--hold-out", 3], "belong together"),
            (["--per-class", 3], "--per-class is for classes"),
            (["--classes", "x"], "--classes is for classes"),
            (["--split", "val"], "--split is for --imagenet"),
        ],
    )
    def test_what_cannot_be_is_refused_and_nothing_written(self, many, more, says):
        with pytest.raises(UserError, match=says):
            listed(many, *more)
        assert {path.name for path in many.parent.iterdir()} == {"photos"}

    def test_both_lists_need_a_file_of_their_own(self, many):
        with pytest.raises(UserError, match="give two files"):
            listed(many, "--hold-out", 3, "--hold-out-csv", many.parent / "list.csv")


def test_a_list_is_of_one_kind(tmp_path):
    captioned, of_class = Sample("a", "a.png", prompt="x"), Sample("b", "b.png", 0, "n")
    assert is_captioned([captioned])
    assert not is_captioned([of_class])
    with pytest.raises(UserError, match="either captions or classes"):
        write_samples(tmp_path / "list.csv", [captioned, of_class])


def test_a_file_name_that_a_list_cannot_hold_is_refused(photos):
    images(photos, "a\nb.png")
    (photos / "a\nb.txt").write_text("x")
    with pytest.raises(UserError, match="control characters"):
        listed(photos)
