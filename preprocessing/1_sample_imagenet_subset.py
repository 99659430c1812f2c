"""Script 1: choose the images: the same number of each class, as a CSV `id, img_path, class_id, synset`.

    python preprocessing/1_sample_imagenet_subset.py --imagenet ILSVRC --split train --per-class 200 \\
        --out data/imagenet/train_200k.csv

Reads ILSVRC/Data/CLS-LOC/{train,val}/{synset}/*.JPEG, or any folder {split}/{class}/ of images. A val folder without class
folders, as Kaggle's download has it, is sorted by LOC_val_solution.csv, looked for in --imagenet and in the folder above.

class_id is the place of the synset in sorted order, as in torchvision's ImageFolder. LOC_synset_mapping.txt, looked for in
the same two places, says which synsets there are; a folder too few or too many is then an error. Without such a file the
class folders decide (or the labels, where there are none), so every split must have the same classes.

Reproducible by --seed; rows go round the classes, so that with the same seed the list of 200 per class is the beginning of
the list of 500.
"""

import csv
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from tqdm import tqdm

from cache.image_list import Sample, write_samples
from common.errors import UserError, run_script
from preprocessing.classes import read_synsets
from preprocessing.options import new_parser, positive

# Those of torchvision's ImageFolder.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
VAL_LABELS, SYNSETS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--imagenet", type=Path, required=True, help="root: holds [ILSVRC/]Data/CLS-LOC/{split}/ or {split}/"
    )
    parser.add_argument("--split", default="train", help="train (default) or val")
    parser.add_argument("--per-class", type=positive, default=200, help="images of each class (default 200)")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--seed", type=int, default=0, help="which images are chosen (default 0)")
    parser.add_argument(
        "--classes",
        type=Path,
        help=f"file of all synsets: {SYNSETS} or imagenet_class_index.json (default: {SYNSETS} beside the images, else the "
        "class folders)",
    )
    parser.add_argument(
        "--val-labels",
        type=Path,
        help=f"labels of a val folder without class folders (default: {VAL_LABELS})",
    )
    args = parser.parse_args(argv)

    folder = find_split(args.imagenet, args.split)
    classes = args.classes or find_beside(args.imagenet, SYNSETS)
    synsets = read_synsets(classes) if classes else None  # before the scan, which takes longer
    found = images_by_synset(folder, args.val_labels, args.imagenet)
    if synsets is None:
        synsets = sorted(found)
    else:
        check_synsets(folder, found, synsets, classes)

    chosen, skipped = {}, 0
    for class_id, synset in enumerate(synsets):
        names = found[synset]
        if len(names) < args.per_class:
            print(
                f"class {class_id} ({synset}) has {len(names)} images, fewer than {args.per_class}: skipped",
                file=sys.stderr,
            )
            skipped += 1
            continue
        # Shuffled whole, so that a longer list begins with the shorter one.
        random.Random(f"{args.seed}/{synset}").shuffle(names)
        chosen[class_id] = [
            Sample(f"{synset}/{stem(name)}", os.path.join(folder, name), class_id, synset)
            for name in names[: args.per_class]
        ]
    if not chosen:
        most = max(map(len, found.values()))
        raise UserError(
            f"no class of {folder} has {args.per_class} images: lower --per-class, to {most} at most"
        )
    samples = [images[rank] for rank in range(args.per_class) for images in chosen.values()]
    if len({sample.id for sample in samples}) != len(samples):
        raise UserError(f"{folder} holds files that differ only in their extension: ids would not be unique")
    write_samples(args.out, samples)
    print(
        f"{args.out}: {len(samples)} images, {args.per_class} of each of {len(chosen)} classes ({skipped} skipped), "
        f"numbered by {classes or f'the classes found in {folder}'}"
    )


def find_split(root: Path, split: str) -> Path:
    """The folder of a split: ILSVRC's layout, Kaggle's with ILSVRC inside, then a plain ImageFolder tree."""
    candidates = [
        root / "Data" / "CLS-LOC" / split,
        root / "ILSVRC" / "Data" / "CLS-LOC" / split,
        root / split,
    ]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UserError(f"no {split} images: none of {', '.join(map(str, candidates))} exists")


def find_beside(root: Path, name: str) -> Path | None:
    """A file of Kaggle's download, which lies in the folder that holds ILSVRC; the root may be either."""
    places = [root / name, Path(os.path.abspath(root)).parent / name]
    return next((path for path in places if path.is_file()), None)


def images_by_synset(folder: Path, labels: Path | None, root: Path) -> dict[str, list[str]]:
    """Sorted image files of every class, as paths relative to `folder`: by class folders, else by the file of labels."""
    with os.scandir(folder) as scan:
        entries = [entry for entry in scan if entry.name[0] != "."]
    synsets = sorted(entry.name for entry in entries if entry.is_dir())
    loose = image_names(entry.name for entry in entries)
    if not synsets:
        return sort_by_labels(folder, loose, labels, root)
    if labels:
        raise UserError(f"{folder} has class folders, which say the labels: leave --val-labels out")
    if loose:
        print(f"{folder}: {len(loose)} images beside the class folders are not used", file=sys.stderr)
    found = {}
    for synset in tqdm(synsets, desc="classes", unit="class", disable=None):  # no bar where no terminal is
        # Names only: a look at each of 1.3 million files would take minutes on a network disk.
        found[synset] = [f"{synset}/{name}" for name in image_names(os.listdir(folder / synset))]
    return found


def sort_by_labels(folder: Path, names: list[str], labels: Path | None, root: Path) -> dict[str, list[str]]:
    """Image files of every labelled class, from a folder that holds all of them side by side."""
    if not names:
        raise UserError(f"{folder} holds neither class folders ({{synset}}/*.JPEG) nor images")
    labels = labels or find_beside(root, VAL_LABELS)
    if labels is None:
        raise UserError(
            f"{folder} holds images without class folders, and {VAL_LABELS} is neither in {root} nor above it: put it there "
            "(Kaggle's download has it), give it with --val-labels, or sort the images into class folders"
        )
    synset_of = read_labels(labels)
    if unlabelled := [name for name in names if stem(name) not in synset_of]:
        raise UserError(
            f"{labels} does not label {len(unlabelled)} of {len(names)} images of {folder}, such as {unlabelled[0]}: give "
            "the labels of this split with --val-labels"
        )
    found = {synset: [] for synset in synset_of.values()}
    for name in names:
        found[synset_of[stem(name)]].append(name)
    return found


def read_labels(path: Path) -> dict[str, str]:
    """Synset by image id, from `ImageId,PredictionString`; a prediction is `synset x y x y ...`, the synset first."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {VAL_LABELS} was expected") from None
    except (KeyError, AttributeError, IndexError, ValueError, csv.Error):
        raise UserError(
            f"{path} is no {VAL_LABELS}: every row must have ImageId and PredictionString, the synset first"
        ) from None


def check_synsets(folder: Path, found: Iterable[str], synsets: list[str], classes: Path) -> None:
    """The classes found are those of the file: otherwise the numbers would not mean the same in every split."""
    if unknown := sorted(set(found) - set(synsets)):
        raise UserError(
            f"{folder} has class {few(unknown)}, which {classes} does not list: move it away, or list it with --classes"
        )
    if missing := sorted(set(synsets) - set(found)):
        raise UserError(
            f"{folder} lacks class {few(missing)}, which {classes} lists: complete the download, or list the classes that "
            "there are in a file for --classes"
        )


def image_names(names: Iterable[str]) -> list[str]:
    """The image files among the names, sorted; hidden ones (macOS writes ._*.JPEG) are none."""
    return sorted(
        name for name in names if name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS
    )


def stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def few(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    run_script(main)
