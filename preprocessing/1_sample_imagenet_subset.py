"""Script 1: choose the same number of images of each class and list them in a CSV `id, img_path, class_id, synset`.

    python preprocessing/1_sample_imagenet_subset.py --imagenet ILSVRC --split train --per-class 200 \\
        --out data/imagenet/train_200k.csv

It reads ILSVRC/Data/CLS-LOC/{train,val}/{synset}/*.JPEG, or any folder {split}/{class}/ of images. The val folder of Kaggle's
download has no class folders; its images are assigned to classes by LOC_val_solution.csv, which is searched for in --imagenet
and in the folder above.

class_id is the position of the synset in sorted order, as in torchvision's ImageFolder. If LOC_synset_mapping.txt is in one of
the same two places, it defines the synsets, and a missing or an additional class folder is an error. Without such a file the
class folders define them (or the labels, where there are no folders), so every split must have the same classes.

The same --seed chooses the same images. Each round of rows has one image of every class, so with the same seed the list of 200
per class is the beginning of the list of 500.
"""

import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from tqdm import tqdm

from cache.csv_file import read_csv
from cache.image_list import Sample, write_samples
from common.arguments import Parser, between, positive
from common.errors import UserError, run_script
from preprocessing.classes import read_synsets

# The same extensions as in torchvision's ImageFolder.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
VAL_LABELS, SYNSETS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    root = "root: holds [ILSVRC/]Data/CLS-LOC/{split}/ or {split}/"
    add("--imagenet", type=Path, required=True, help=root)
    add("--split", default="train", help="train (default) or val")
    add("--per-class", type=positive, default=200, help="images of each class (default 200)")
    add("--out", type=Path, required=True, help="the CSV to write")
    add("--seed", type=between(0, 2**62), default=0, help="which images are chosen (default 0)")
    listed = (
        f"file of all synsets: {SYNSETS} or imagenet_class_index.json (default: {SYNSETS} beside the images, else the class "
        "folders)"
    )
    add("--classes", type=Path, help=listed)
    labels = f"labels of a val folder without class folders (default: {VAL_LABELS})"
    add("--val-labels", type=Path, help=labels)
    args = parser.parse_args(argv)

    folder = find_split(args.imagenet, args.split)
    classes = args.classes or find_beside(args.imagenet, SYNSETS)
    # The file is read before the long scan, so that damage is reported at once.
    synsets = read_synsets(classes) if classes else None
    found = images_by_synset(folder, args.val_labels, args.imagenet)
    if synsets is None:
        synsets = sorted(found)
    else:
        check_synsets(folder, found, synsets, classes)

    chosen = {}
    for class_id, synset in enumerate(synsets):
        names = found[synset]
        if len(names) < args.per_class:
            few_images = f"class {class_id} ({synset}) has {len(names)} images, fewer than {args.per_class}"
            print(f"{few_images}: skipped", file=sys.stderr)
            continue
        # All names are shuffled, not only those chosen, so that a longer list begins with the shorter one.
        random.Random(f"{args.seed}/{synset}").shuffle(names)
        chosen[class_id] = [
            Sample(f"{synset}/{Path(name).stem}", os.path.join(folder, name), class_id, synset)
            for name in names[: args.per_class]
        ]
    if not chosen:
        most = max(map(len, found.values()))
        todo = (
            f"lower --per-class, to {most} at most"
            if most
            else "there are none, so check the folder and --split"
        )
        raise UserError(f"no class of {folder} has {args.per_class} images: {todo}")
    samples = [images[rank] for rank in range(args.per_class) for images in chosen.values()]
    if len({sample.id for sample in samples}) != len(samples):
        raise UserError(f"{folder} holds files that differ only in their extension: ids would not be unique")
    write_samples(args.out, samples)
    print(
        f"{args.out}: {len(samples)} images, {args.per_class} of each of {len(chosen)} classes "
        f"({len(synsets) - len(chosen)} skipped), numbered by {classes or f'the classes found in {folder}'}"
    )


def find_split(root: Path, split: str) -> Path:
    """Return the folder of a split. Tried are ILSVRC's layout, Kaggle's with ILSVRC inside, then a plain ImageFolder tree."""
    candidates = [root / inside / split for inside in ("Data/CLS-LOC", "ILSVRC/Data/CLS-LOC", "")]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UserError(f"no {split} images: none of {', '.join(map(str, candidates))} exists")


def find_beside(root: Path, name: str) -> Path | None:
    """Find a file of Kaggle's download beside the folder ILSVRC, which `root` is or contains; None if it is not there."""
    places = [root / name, Path(os.path.abspath(root)).parent / name]
    return next((path for path in places if path.is_file()), None)


def images_by_synset(folder: Path, labels: Path | None, root: Path) -> dict[str, list[str]]:
    """Return the sorted image files of every class, relative to `folder`; class folders decide, or else the file of labels."""
    with os.scandir(folder) as scan:
        synsets = sorted(entry.name for entry in scan if entry.name[0] != "." and entry.is_dir())
    loose = image_names(folder)
    if not synsets:
        return sort_by_labels(folder, loose, labels, root)
    if labels:
        raise UserError(f"{folder} has class folders, which say the labels: leave --val-labels out")
    if loose:
        print(f"{folder}: {len(loose)} images beside the class folders are not used", file=sys.stderr)
    found = {}
    for synset in tqdm(synsets, desc="classes", unit="class", disable=None):  # None: a bar only on a terminal
        # Only folders are read: opening or checking each of 1.3 million files would take minutes on a network disk.
        found[synset] = [f"{synset}/{name}" for name in image_names(folder / synset)]
    return found


def sort_by_labels(folder: Path, names: list[str], labels: Path | None, root: Path) -> dict[str, list[str]]:
    """Return the image files of every labelled class, from one folder that contains the images of all classes."""
    if not names:
        raise UserError(f"{folder} holds neither class folders ({{synset}}/*.JPEG) nor images")
    labels = labels or find_beside(root, VAL_LABELS)
    if labels is None:
        raise UserError(
            f"{folder} holds images without class folders, and {VAL_LABELS} is neither in {root} nor above it: put it there "
            "(Kaggle's download has it), give it with --val-labels, or sort the images into class folders"
        )
    synset_of = read_labels(labels)
    if unlabelled := [name for name in names if Path(name).stem not in synset_of]:
        raise UserError(
            f"{labels} does not label {len(unlabelled)} of {len(names)} images of {folder}, such as {unlabelled[0]}: give "
            "the labels of this split with --val-labels"
        )
    found = {synset: [] for synset in synset_of.values()}
    for name in names:
        found[synset_of[Path(name).stem]].append(name)
    return found


def read_labels(path: Path) -> dict[str, str]:
    """Read the synset of each image id from a CSV `ImageId,PredictionString`; a prediction is `synset x y x y ...`."""
    remedy, synset_of = f"give {VAL_LABELS}, in which every prediction begins with the synset", {}
    for line, (key, prediction) in read_csv(path, ["ImageId", "PredictionString"], remedy):
        if not prediction.strip():
            raise UserError(f"line {line} of {path} has no prediction: {remedy}")
        synset_of[key] = prediction.split()[0]
    return synset_of


def check_synsets(folder: Path, found: Iterable[str], synsets: list[str], classes: Path) -> None:
    """Check that the classes found are those of the file, so that class numbers mean the same in every split."""
    if unknown := sorted(set(found) - set(synsets)):
        raise UserError(
            f"{folder} has class {few(unknown)}, which {classes} does not list: move it away, or list it with --classes"
        )
    if missing := sorted(set(synsets) - set(found)):
        raise UserError(
            f"{folder} lacks class {few(missing)}, which {classes} lists: complete the download, or list the classes that "
            "there are in a file for --classes"
        )


def image_names(folder: Path) -> list[str]:
    """Return the image files of a folder, sorted, without hidden files (macOS writes ._*.JPEG).

    What has the name of an image and is no regular file, such as a FIFO, is reported on stderr and left out; none is opened.
    """
    with os.scandir(folder) as scan:
        shown = [entry for entry in scan if entry.name[0] != "."]
    named = [entry for entry in shown if os.path.splitext(entry.name)[1].lower() in EXTENSIONS]
    files = sorted(entry.name for entry in named if _is_file(entry))
    if odd := sorted({entry.name for entry in named} - set(files)):
        print(f"{folder}: {few(odd)} left out, no regular file", file=sys.stderr)
    return files


def _is_file(entry: os.DirEntry) -> bool:
    """Return whether an entry, or what it links to, is a regular file; the folder says that of all but links."""
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def few(names: list[str]) -> str:
    """Format up to three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    run_script(main)
