"""ImageNet as it is downloaded: the choice of images, the files of classes, and every kind of image file."""

import csv
import errno
import json
import os
import random
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import image_tree, run_numbered, sample
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from cache import views
from cache.image_list import COLUMNS, read_samples
from cache.views import UnreadableImage, cut_view, read_image, read_view
from common.errors import UserError
from preprocessing.classes import read_classes, read_synsets

SYNSETS = ["n01440764", "n01443537", "n01484850"]
NAMES = ["tench", "goldfish", "great white shark"]
MAPPING = "\n".join(
    [
        "n01440764 tench, Tinca tinca",
        "n01443537 goldfish, Carassius auratus",
        "n01484850 great white shark, white shark, man-eater",
    ]
)
INDEX = {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "great_white_shark"]}
PLAIN = {"0": "tench", "1": "goldfish", "2": "great white shark"}


def write(path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read_class_names(path) -> list[str]:
    return [name for _, name in read_classes(path)]


def one_line(error, *parts: object) -> None:
    """The error's message is one line and holds the parts."""
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


class TestSampling:
    def test_every_class_has_the_same_number_and_ids_follow_sorted_synsets(self, tmp_path):
        image_tree(tmp_path, {"n02": 5, "n01": 6, "n03": 5})
        samples = sample(tmp_path, tmp_path / "list.csv", 4)
        assert {(s.class_id, s.synset) for s in samples} == {(0, "n01"), (1, "n02"), (2, "n03")}
        assert [sum(s.class_id == c for s in samples) for c in range(3)] == [4, 4, 4]
        assert all(
            Path(s.img_path).exists() and s.id == f"{s.synset}/{Path(s.img_path).stem}" for s in samples
        )
        with open(tmp_path / "list.csv") as file:
            assert next(csv.reader(file)) == COLUMNS == ["id", "img_path", "class_id", "synset"]

    def test_a_short_class_is_skipped_by_name_and_keeps_the_others_numbers(self, tmp_path, capsys):
        image_tree(tmp_path, {"n01": 4, "n02": 2, "n03": 4})
        samples = sample(tmp_path, tmp_path / "list.csv", 3)
        assert {s.class_id for s in samples} == {0, 2}
        assert "class 1 (n02) has 2 images" in capsys.readouterr().err

    def test_the_smaller_list_begins_the_larger_one_and_the_seed_decides(self, tmp_path):
        image_tree(tmp_path, {"n01": 9, "n02": 9})
        small, large, again, other = (
            sample(tmp_path, tmp_path / f"{i}.csv", count, seed)
            for i, (count, seed) in enumerate([(3, 0), (7, 0), (7, 0), (7, 1)])
        )
        assert large[: len(small)] == small
        assert large == again
        assert {s.id for s in large} != {s.id for s in other}

    def test_hidden_folders_are_no_classes(self, tmp_path):
        image_tree(tmp_path, {"n01": 2, "n02": 2})
        (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
        assert {(s.class_id, s.synset) for s in sample(tmp_path, tmp_path / "list.csv", 2)} == {
            (0, "n01"),
            (1, "n02"),
        }

    def test_nothing_to_sample_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="no train images"):
            sample(tmp_path, tmp_path / "list.csv", 1)
        image_tree(tmp_path, {"n01": 1})
        with pytest.raises(UserError, match="lower --per-class"):
            sample(tmp_path, tmp_path / "list.csv", 2)


def flat_val(root, sorted_root, shuffled=7) -> Path:
    """The images of sorted_root/val/{synset}/ side by side in root/val, and their labels in the order of no class."""
    flat, rows = root / "val", []
    flat.mkdir(parents=True)
    for path in (sorted_root / "val").glob("*/*.JPEG"):
        shutil.copy(path, flat / path.name)
        rows.append(f"{path.stem},{path.parent.name} 10 20 30 40 {path.parent.name} 1 2 3 4 ")
    random.Random(shuffled).shuffle(rows)
    write(root / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return flat


class TestLayouts:
    @pytest.mark.parametrize("inside", ["Data/CLS-LOC", "ILSVRC/Data/CLS-LOC", "."])
    def test_every_layout_gives_the_same_choice(self, tmp_path, inside):
        image_tree(tmp_path / "plain", {"n01": 4, "n02": 4})
        image_tree(tmp_path / "other" / inside, {"n01": 4, "n02": 4})
        plain, other = (sample(tmp_path / name, tmp_path / f"{name}.csv", 3) for name in ("plain", "other"))
        assert [s.id for s in plain] == [s.id for s in other]
        assert all(Path(s.img_path).is_relative_to(tmp_path / "other" / inside / "train") for s in other)

    def test_class_ids_and_files_are_those_of_torchvisions_imagefolder(self, tmp_path):
        """Names that sort differently by case and by number, and every extension that torchvision takes."""
        image_tree(tmp_path, {"n2": 1, "n10": 1, "N3": 1, "a": 1})
        for name in ("x.PNG", "y.bmp", "z.tif", "u.webp", "v.ppm", "w.jpg"):
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / name)
        write(tmp_path / "train" / "a" / "notes.txt", "no image")
        theirs = ImageFolder(tmp_path / "train")
        ours = sample(tmp_path, tmp_path / "one.csv", 1)
        assert {s.synset: s.class_id for s in ours} == theirs.class_to_idx
        ours = sample(tmp_path, tmp_path / "all.csv", 7)
        assert {s.img_path for s in ours} == {
            path for path, label in theirs.samples if label == theirs.class_to_idx["a"]
        }

    def test_files_that_macos_leaves_are_no_images(self, tmp_path):
        image_tree(tmp_path, {"n01": 2})
        write(tmp_path / "train" / "n01" / "._n01_0.JPEG", "resource fork")
        assert len(sample(tmp_path, tmp_path / "list.csv", 2)) == 2
        with pytest.raises(UserError, match="lower --per-class"):
            sample(tmp_path, tmp_path / "list.csv", 3)

    def test_the_choice_is_the_beginning_of_a_shuffle_of_sorted_names(self, tmp_path):
        """Existing lists must come out again: seed and class alone decide, written out here."""
        image_tree(tmp_path, {"n01": 30, "n02": 12})
        chosen = sample(tmp_path, tmp_path / "list.csv", 5, 3)
        for synset, count in (("n01", 30), ("n02", 12)):
            names = sorted(f"{synset}_{i}.JPEG" for i in range(count))
            random.Random(f"3/{synset}").shuffle(names)
            assert [Path(s.img_path).name for s in chosen if s.synset == synset] == names[:5]

    def test_loose_images_beside_class_folders_are_told_of(self, tmp_path, capsys):
        image_tree(tmp_path, {"n01": 2})
        shutil.copy(tmp_path / "train" / "n01" / "n01_0.JPEG", tmp_path / "train" / "left.JPEG")
        sample(tmp_path, tmp_path / "list.csv", 2)
        assert "1 images beside the class folders are not used" in capsys.readouterr().err


class TestFlatVal:
    @pytest.fixture
    def both(self, tmp_path):
        """Roots of the same val images, sorted into class folders and flat; names interleave the classes."""
        for i in range(24):
            folder = tmp_path / "sorted" / "val" / f"n{i * 7 % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
        flat_val(tmp_path / "flat", tmp_path / "sorted")
        return tmp_path / "sorted", tmp_path / "flat"

    def chosen(self, root, per_class=3, *more):
        samples = sample(root, root / "list.csv", per_class, 0, "--split", "val", *more)
        return [(s.id, s.class_id, s.synset) for s in samples], samples

    def test_it_gives_the_list_of_the_sorted_val_with_the_real_paths(self, both):
        expected, _ = self.chosen(both[0])
        same, samples = self.chosen(both[1])
        assert same == expected
        assert all(Path(s.img_path) == both[1] / "val" / f"{s.id.split('/')[1]}.JPEG" for s in samples)
        assert all(Path(s.img_path).is_file() for s in samples)

    def test_kaggles_layout_is_found_from_either_root(self, both, tmp_path, monkeypatch):
        kaggle = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
        kaggle.mkdir(parents=True)
        (both[1] / "val").rename(kaggle / "val")
        (both[1] / "LOC_val_solution.csv").rename(tmp_path / "kaggle" / "LOC_val_solution.csv")
        expected, _ = self.chosen(both[0])
        assert self.chosen(tmp_path / "kaggle")[0] == expected
        assert self.chosen(tmp_path / "kaggle" / "ILSVRC")[0] == expected
        monkeypatch.chdir(tmp_path / "kaggle" / "ILSVRC")
        assert self.chosen(Path("."))[0] == expected

    def test_labels_can_be_given(self, both, tmp_path):
        labels = (both[1] / "LOC_val_solution.csv").rename(tmp_path / "labels.csv")
        with pytest.raises(UserError) as error:
            self.chosen(both[1])
        one_line(error, "LOC_val_solution.csv", "--val-labels")
        assert self.chosen(both[1], 3, "--val-labels", labels)[0] == self.chosen(both[0])[0]

    def test_a_missing_image_is_a_shorter_class_and_shifts_no_number(self, both, capsys):
        before, _ = self.chosen(both[1], 8)
        first = next(key for key, number, _ in before if number == 0)
        (both[1] / "val" / f"{Path(first).name}.JPEG").unlink()
        after, _ = self.chosen(both[1], 8)
        assert after == [row for row in before if row[1] != 0]
        assert "class 0 (n0) has 7 images" in capsys.readouterr().err

    def test_labels_of_other_images_are_refused(self, both, tmp_path):
        text = (both[1] / "LOC_val_solution.csv").read_text()
        for wrong, part in [
            (text.replace("val_00000003", "train_3"), "does not label 1 of 24 images"),
            ("id,label\na,b\n", "the columns must be ImageId"),
            (text + "ILSVRC2012_val_00000099,\n", "has no prediction: give LOC_val_solution.csv"),
            (text + "ILSVRC2012_val_00000099\n", "has 1 fields instead of 2"),
        ]:
            labels = write(tmp_path / "wrong.csv", wrong)
            with pytest.raises(UserError) as error:
                self.chosen(both[1], 3, "--val-labels", labels)
            one_line(error, labels, part)
        with pytest.raises(UserError, match=r"cannot read .*nowhere.csv"):
            self.chosen(both[1], 3, "--val-labels", tmp_path / "nowhere.csv")
        with pytest.raises(UserError, match="leave --val-labels out"):
            self.chosen(both[0], 3, "--val-labels", both[1] / "LOC_val_solution.csv")

    def test_an_empty_folder_is_one_line(self, tmp_path):
        (tmp_path / "val").mkdir()
        with pytest.raises(UserError) as error:
            self.chosen(tmp_path)
        one_line(error, tmp_path / "val", "neither class folders")


class TestNumbering:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "kaggle" / "ILSVRC"
        image_tree(root, dict.fromkeys(SYNSETS, 2))
        image_tree(root, dict.fromkeys(SYNSETS, 2), split="val")
        return root

    @pytest.mark.parametrize("place", ["LOC_synset_mapping.txt", "../LOC_synset_mapping.txt"])
    def test_a_mapping_file_is_found_and_a_missing_folder_is_named(self, root, tmp_path, place):
        write(root / place, MAPPING)
        assert {s.synset: s.class_id for s in sample(root, tmp_path / "list.csv", 2)} == {
            synset: number for number, synset in enumerate(SYNSETS)
        }
        shutil.rmtree(root / "train" / SYNSETS[0])
        with pytest.raises(UserError) as error:
            sample(root, tmp_path / "list.csv", 2)
        one_line(error, "lacks class n01440764,", "LOC_synset_mapping.txt", "--classes")

    def test_a_folder_that_the_file_does_not_list_is_named(self, root, tmp_path):
        classes = write(tmp_path / "classes.txt", MAPPING)
        (root / "train" / "lost+found").mkdir()
        with pytest.raises(UserError) as error:
            sample(root, tmp_path / "list.csv", 2, 0, "--classes", classes)
        one_line(error, "has class lost+found,", classes)

    def test_at_most_three_classes_are_named(self, root, tmp_path):
        more = [f"n9000000{i} thing" for i in range(5)]
        classes = write(tmp_path / "classes.txt", MAPPING + "\n" + "\n".join(more))
        with pytest.raises(UserError) as error:
            sample(root, tmp_path / "list.csv", 2, 0, "--classes", classes)
        one_line(error, "lacks class n90000000, n90000001, n90000002 and 2 more,")

    @pytest.mark.parametrize("content", [MAPPING, INDEX], ids=["mapping", "index"])
    def test_the_file_given_goes_before_the_file_found(self, root, tmp_path, content):
        write(root / "LOC_synset_mapping.txt", MAPPING + "\nn90000000 thing")
        classes = write(tmp_path / "classes", content)
        assert len(sample(root, tmp_path / "list.csv", 2, 0, "--classes", classes)) == 6

    def test_a_short_class_shifts_no_number(self, root, tmp_path):
        write(root / "LOC_synset_mapping.txt", MAPPING)
        for path in (root / "train" / SYNSETS[1]).iterdir():
            path.unlink()
        assert {s.class_id for s in sample(root, tmp_path / "list.csv", 2)} == {0, 2}

    def test_without_a_file_the_folders_decide_and_the_output_says_so(self, root, tmp_path, capsys):
        shutil.rmtree(root / "val" / SYNSETS[0])
        assert {s.class_id for s in sample(root, tmp_path / "list.csv", 2, 0, "--split", "val")} == {0, 1}
        assert f"numbered by the classes found in {root / 'val'}" in capsys.readouterr().out

    def test_a_flat_val_is_numbered_by_the_file_too(self, root, tmp_path):
        flat_val(tmp_path / "flat", root)
        classes = write(tmp_path / "classes.txt", MAPPING)
        arguments = [2, 0, "--split", "val", "--classes", classes]
        assert len(sample(tmp_path / "flat", tmp_path / "list.csv", *arguments)) == 6
        write(classes, MAPPING + "\nn00000001 thing")
        with pytest.raises(UserError, match="lacks class n00000001"):
            sample(tmp_path / "flat", tmp_path / "list.csv", *arguments)


class TestClassFiles:
    @pytest.mark.parametrize(
        "content",
        [
            MAPPING,
            "\n".join(reversed(MAPPING.splitlines())) + "\n\n",
            MAPPING.replace(" ", "\t", 1),
            "\ufeff" + MAPPING.replace("\n", "\r\n"),
            INDEX,
            PLAIN,
            dict(reversed(PLAIN.items())),
        ],
        ids=["mapping", "unsorted lines", "tab", "Windows", "index", "plain", "unsorted keys"],
    )
    def test_every_format_gives_the_same_names_and_synsets(self, tmp_path, content):
        path = write(tmp_path / "classes", content)
        assert read_class_names(path) == NAMES
        if isinstance(content, str) or content is INDEX:
            assert read_synsets(path) == SYNSETS
        else:
            with pytest.raises(UserError) as error:
                read_synsets(path)
            one_line(error, path, "LOC_synset_mapping.txt or imagenet_class_index.json")

    def test_the_tenth_class_comes_after_the_ninth(self, tmp_path):
        names = {str(i): f"name {i}" for i in range(12)}
        assert read_class_names(write(tmp_path / "plain.json", names)) == list(names.values())

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("", "is empty"),
            ("{", "is not JSON"),
            ("id,img_path\na,b\n", "line 1 of"),
            ("0: tench\n", "looks like YAML"),
            ("- tench\n", "looks like YAML"),
            ("0 tench\n1 shark\n", "looks like a numbered list"),
            ("1. tench\n", "looks like a numbered list"),
            ("0,tench shark\n", "looks like a CSV"),
            ("[" * 3000, "is not JSON"),
            ('{"0": "\\ud800"}', "is not JSON"),
            ('{"٠": "tench"}', "without a gap; 0 is missing"),
            (MAPPING + "\nn02000000", "line 4 has no name"),
            (MAPPING + "\nn02000000 , x", "line 4 has no name"),
            (MAPPING + "\nn01443537 carp", "names the synset n01443537 twice"),
            (INDEX | {"3": ["n01443537", "carp"]}, "names the synset n01443537 twice"),
            (INDEX | {"2": ["n00000001", "shark"]}, "numbers n01440764 as 0"),
            (INDEX | {"2": "shark"}, "some classes a synset and others none"),
            (INDEX | {"2": ["n02000000"]}, "maps 2 to"),
            (PLAIN | {"2": " "}, 'maps 2 to " "'),
            (PLAIN | {"2": 5}, "maps 2 to 5"),
            (PLAIN | {"4": "carp"}, "without a gap; 3 is missing"),
            ({"1": "tench"}, "without a gap; 0 is missing"),
            ('{"0": "tench", "0": "carp"}', "names the class 0 twice"),
            ("{}", "without a gap"),
            (["tench"], "must map every class number"),
        ],
    )
    def test_a_damaged_file_is_one_line(self, tmp_path, content, part):
        path = write(tmp_path / "classes", content)
        for read in (read_class_names, read_synsets):
            with pytest.raises(UserError) as error:
                read(path)
            one_line(error, path, part)

    def test_a_missing_or_binary_file_is_one_line(self, tmp_path):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for name, part in (("nowhere", "cannot read"), ("binary", "is no UTF-8"), (".", "no regular file")):
            with pytest.raises(UserError) as error:
                read_class_names(tmp_path / name)
            one_line(error, tmp_path / name, part)

    def test_script_4_reads_the_mapping_file(self, tmp_path):
        """It gets as far as the model, which is not there."""
        classes = write(tmp_path / "LOC_synset_mapping.txt", MAPPING)
        arguments = ["--class-names", classes, "--base", tmp_path / "nowhere", "--out", tmp_path / "text"]
        with pytest.raises(UserError, match=r"nowhere.* does not exist"):
            run_numbered("4_prepare_text_embeddings", *arguments)


class TestViews:
    def test_aligned_view_is_the_central_square_of_the_vae(self):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
        expected = Image.fromarray(pixels[:, 12:28]).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(cut_view(Image.fromarray(pixels), 8)), np.asarray(expected))
        assert np.array_equal(
            np.asarray(cut_view(Image.fromarray(pixels), 16)), pixels[:, 12:28]
        )  # no resampling

    @pytest.mark.parametrize(
        ("size", "box"), [((16, 40), (0, 3, 40, 19)), ((21, 7), (16, 0, 23, 22)), ((4, 8), (0, 1, 40, 21))]
    )
    def test_a_crop_of_any_shape_is_the_largest_central_one(self, size, box):
        """`size` is height and width, `box` left, top, right and bottom."""
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (22, 40, 3), np.uint8))
        expected = image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(cut_view(image, size)), np.asarray(expected))
        # A teacher's own size has seldom the exact shape of the crop that it is to see.
        expected = image.crop(box).resize((5, 3), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(cut_view(image, (3, 5), crop=size)), np.asarray(expected))

    def test_official_view_is_dinov2s_transform(self):
        """Resize(256, bicubic) + CenterCrop(224), written out."""
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
        resized = image.resize((341, 256), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[16:240, 58:282]
        assert np.array_equal(np.asarray(cut_view(image, 224, "official")), expected)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
    def test_any_colour_mode_becomes_rgb(self, tmp_path, mode):
        path = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (9, 12), (200, 10, 30)).convert(mode).save(path)
        assert read_view(path, 4).shape == (4, 4, 3)

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
        assert np.abs(read_view(tmp_path / "deep.png", 4).astype(int) - 128).max() <= 1

    def test_exif_rotation_is_applied(self, tmp_path):
        image = Image.new("RGB", (8, 8))
        image.paste((255, 255, 255), (0, 0, 8, 4))  # white above
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180°
        image.save(tmp_path / "turned.png", exif=exif)
        view = read_view(tmp_path / "turned.png", 8)
        assert view[0].mean() < 50 < view[-1].mean()


def gradient(height=12, width=9) -> np.ndarray:
    """Smooth colours without symmetry, `(H, W, 3)` uint8, that JPEG keeps well."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([20 * y, 25 * x, 250 - 10 * (x + y)], axis=-1).clip(0, 255).astype(np.uint8)


class TestImageKinds:
    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "RGB"])
    def test_an_eight_bit_image_is_read_as_torchvision_reads_it(self, tmp_path, mode):
        path = tmp_path / "image.png"
        image = Image.fromarray(gradient()).convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(Image.fromarray(gradient()[..., 0]))
        image.save(path, **({"transparency": bytes(range(256))} if mode == "P" else {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that palette and transparency meet
            theirs = default_loader(str(path))
        ours = read_image(path)
        assert ours.mode == "RGB"
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))

    def test_cmyk_jpegs_of_photoshop_keep_their_colours(self, tmp_path):
        """They hold inverted inks; 22 images of ImageNet are such. Read as they are, red would become cyan."""
        path = tmp_path / "image.jpg"
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
        assert b"Adobe" in path.read_bytes()
        assert np.abs(np.asarray(read_image(path)).astype(int) - (255, 0, 0)).max() <= 3

    @pytest.mark.parametrize("kind", ["png", "pgm", "little.tiff", "big.tiff", "int.tiff"])
    def test_sixteen_bits_of_every_format_are_scaled(self, tmp_path, kind):
        """The upper byte of each pixel, which is how PIL itself reads 16-bit RGB."""
        path, deep = tmp_path / f"deep.{kind}", np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
        if kind == "pgm":
            path.write_bytes(b"P5\n16 16\n65535\n" + deep.astype(">u2").tobytes())
        elif kind == "big.tiff":
            Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes()).save(path)
        else:
            Image.fromarray(deep.astype(np.int32) if kind == "int.tiff" else deep).save(path)
        assert np.array_equal(np.asarray(read_image(path)), np.repeat(deep[..., None] // 256, 3, axis=-1))

    @pytest.mark.parametrize("pixels", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
    def test_pixels_of_unknown_range_are_refused(self, tmp_path, pixels):
        Image.fromarray(pixels).save(tmp_path / "image.tiff")
        with pytest.raises(UnreadableImage, match="its pixels"):
            read_image(tmp_path / "image.tiff")

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
    def test_every_exif_orientation_is_undone(self, tmp_path, kind, orientation):
        path, exif = tmp_path / f"image.{kind}", Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(gradient()).save(path, exif=exif)
        with Image.open(path) as image:
            theirs = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(np.asarray(read_image(path)), np.asarray(theirs))
        assert theirs.size == ((9, 12) if orientation < 5 else (12, 9))

    def test_a_damaged_tag_beside_the_orientation_costs_no_image(self, tmp_path):
        """PIL's exif_transpose writes all tags anew, and cannot write this one."""
        path, exif = tmp_path / "image.jpg", Image.Exif()
        exif[0x0112], exif[0x0128] = 3, 2  # orientation; unit of the resolution
        Image.fromarray(gradient()).save(path, exif=exif)
        upright = np.asarray(read_image(path))
        data = path.read_bytes()
        at = data.index(b"\x01\x28\x00\x03")
        path.write_bytes(data[: at + 2] + b"\x00\x07" + data[at + 4 :])  # bytes instead of an integer
        with Image.open(path) as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert np.array_equal(np.asarray(read_image(path)), upright)

    def test_one_decode_gives_both_views(self, tmp_path):
        Image.fromarray(gradient(40, 60)).save(tmp_path / "image.png")
        image = read_image(tmp_path / "image.png")
        for size, view in ((16, "aligned"), (14, "official")):
            assert np.array_equal(
                np.asarray(cut_view(image, size, view)), read_view(tmp_path / "image.png", size, view)
            )

    def test_odd_but_usable_images_are_read_in_silence(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        huge, palette, exif = (tmp_path / name for name in ("huge.png", "palette.png", "exif.jpg"))
        Image.new("RGB", (15, 10)).save(huge)  # above the limit that warns, below the one that refuses
        Image.fromarray(gradient()[:9]).convert("P").save(palette, transparency=bytes(range(256)))
        tags = Image.Exif()
        tags[0x010F] = "a maker of cameras"
        Image.new("RGB", (8, 8)).save(exif, exif=tags)
        data = exif.read_bytes()
        at = data.index(b"\x01\x0f\x00\x02")
        exif.write_bytes(data[: at + 4] + b"\x00\x00\xff\xff" + data[at + 8 :])  # longer than the file
        for path in (huge, palette, exif):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                with Image.open(path) as image:
                    image.getexif()
                    image.convert("RGB")
            assert told, f"{path} was to be odd"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read_view(path, 4)

    def test_an_image_far_above_the_limit_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (15, 15)).save(tmp_path / "bomb.png")
        with pytest.raises(UnreadableImage, match="exceeds limit of 200 pixels"):
            read_view(tmp_path / "bomb.png", 4)

    def test_damaged_files_are_unreadable_and_say_so_in_one_line(self, tmp_path):
        for kind in ("jpg", "png", "webp", "bmp", "tiff"):
            Image.fromarray(gradient(40, 40)).save(tmp_path / f"whole.{kind}")
            data = (tmp_path / f"whole.{kind}").read_bytes()
            for length in (0, 10, len(data) // 2):
                path = tmp_path / f"cut.{kind}"
                path.write_bytes(data[:length])
                with pytest.raises(UnreadableImage) as error:
                    read_view(path, 4)
                one_line(error, f"{path}: ")
                assert "BytesIO" not in str(error.value)
        with pytest.raises(UnreadableImage, match="not an image"):
            read_view(write(tmp_path / "text.jpg", "This is no picture.\n" * 50), 4)

    def test_random_damage_raises_nothing_else(self, tmp_path):
        rng, exif, path = np.random.default_rng(0), Image.Exif(), tmp_path / "damaged"
        exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
        outcomes = set()
        for kind in ("jpeg", "png", "webp", "tiff"):
            Image.fromarray(gradient()).save(path, kind, exif=exif)
            data = path.read_bytes()
            for _ in range(60):
                broken = bytearray(data)
                for place in rng.integers(0, len(data), 3):
                    broken[place] = rng.integers(0, 256)
                path.write_bytes(broken)
                try:
                    read_view(path, 4)
                    outcomes.add("read")
                except UnreadableImage:
                    outcomes.add("unreadable")
        assert outcomes == {"read", "unreadable"}


class TestFileSystem:
    """What the file system does not give is no damaged image, and stops the run instead of leaving images out."""

    def test_a_missing_file_is_one_line(self, tmp_path):
        path = tmp_path / "nowhere.png"
        with pytest.raises(UserError) as error:
            read_view(path, 8)
        one_line(error, f"cannot read {path}: ", "still mounted", "goes on from here")

    def test_what_is_no_regular_file_is_left_out_and_never_opened(self, tmp_path):
        os.mkfifo(tmp_path / "fifo.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        (tmp_path / "device.png").symlink_to("/dev/zero")
        for path in (*tmp_path.iterdir(), tmp_path):
            with pytest.raises(UnreadableImage) as error:
                read_view(path, 8)
            one_line(error, f"{path}: ")

    def test_an_image_beyond_the_stated_memory_is_left_out(self, tmp_path, monkeypatch):
        narrow = Image.new("RGB", (60_000, 1))
        assert cut_view(narrow, 8).size == (8, 8)
        with pytest.raises(UnreadableImage, match=r"60000 × 1 pixels, resized: .* bytes"):
            cut_view(narrow, 196, "official")
        Image.new("RGB", (30, 30)).save(tmp_path / "image.png")
        monkeypatch.setattr(views, "MAX_BYTES", 3000)
        with pytest.raises(UnreadableImage, match=r"30 × 30 pixels need 3,600 bytes"):
            read_view(tmp_path / "image.png", 8)

    def test_script_1_leaves_out_what_is_no_file_and_says_so(self, tmp_path, capsys):
        image_tree(tmp_path, {"n0": 3, "n1": 3})
        os.mkfifo(tmp_path / "train" / "n0" / "fifo.png")
        (tmp_path / "train" / "n1" / "loop.png").symlink_to("loop.png")
        arguments = ["--imagenet", tmp_path, "--per-class", 3, "--out", tmp_path / "list.csv"]
        run_numbered("1_sample_imagenet_subset", *arguments)
        said = capsys.readouterr().err
        assert "fifo.png left out" in said
        assert "loop.png left out" in said
        assert len(read_samples(tmp_path / "list.csv")) == 6

    def test_a_name_that_is_no_utf_8_is_shown_by_its_bytes(self, tmp_path):
        image_tree(tmp_path, {"n0": 1})
        (image,) = (tmp_path / "train" / "n0").iterdir()
        os.rename(image, os.fsencode(image.parent) + b"/a\xff.png")
        arguments = ["--imagenet", tmp_path, "--per-class", 1, "--out", tmp_path / "list.csv"]
        with pytest.raises(UserError, match=r"n0/a\\xff\.png is no UTF-8: rename"):
            run_numbered("1_sample_imagenet_subset", *arguments)

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN])
    def test_a_failing_disk_is_one_line_with_the_reason(self, tmp_path, monkeypatch, number):
        def fail(self):
            raise OSError(number, os.strerror(number), str(self))

        Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
        read_view(tmp_path / "image.png", 4)
        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(UserError) as error:
            read_view(tmp_path / "image.png", 4)
        one_line(error, os.strerror(number))
