"""Script 1: list the images of a training in a CSV, with their classes or with their captions.

    python preprocessing/1_sample_imagenet_subset.py --imagenet ILSVRC --split train --per-class 200 \\
        --out data/imagenet/train_200k.csv
    python preprocessing/1_sample_imagenet_subset.py --images photos --hold-out 500 --hold-out-csv data/photos/val.csv \\
        --out data/photos/train.csv
    python preprocessing/1_sample_imagenet_subset.py --videos films --frames 17 --fps 8 --windows 2 --out data/films/train.csv

With --images it reads a folder of one's own, and finds by itself which of these it is:

    metadata.csv or metadata.jsonl       file_name, text: the caption of each image, as the datasets library has them
    a .txt of the same name by an image  the whole text is the caption
    {class}/ of images                   no captions; classes as below

and writes `id, img_path, prompt` for captioned images. --count takes that many of them (default: all), and --hold-out keeps
others apart, for evaluation, in a second CSV: with the same --seed and the same images they are always the same, whatever
--count says.

With --videos it does the same with a folder of films, and writes `id, img_path, start, fps, frames, prompt`: --frames frames
at --fps a second, beginning at `start` seconds, of which each film gives --windows, evenly spread. A video autoencoder takes
4 k + 1 frames, LTX-Video's 8 k + 1. Films that are too short or cannot be read are named and left out. --count and --hold-out
count films, so that no film is in both lists.

With --imagenet it chooses the same number of images of each class, and writes `id, img_path, class_id, synset`. It reads
ILSVRC/Data/CLS-LOC/{train,val}/{synset}/*.JPEG, or any folder {split}/{class}/ of images. The val folder of Kaggle's download
has no class folders; its images are assigned to classes by LOC_val_solution.csv, which is searched for in --imagenet and in the
folder above.

class_id is the position of the synset in sorted order, as in torchvision's ImageFolder. If LOC_synset_mapping.txt is in one of
the same two places, it defines the synsets, and a missing or an additional class folder is an error. Without such a file the
class folders define them (or the labels, where there are no folders), so every split must have the same classes.

The same --seed chooses the same images. Each round of rows has one image of every class, so with the same seed the list of 200
per class is the beginning of the list of 500.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that imports from the root work

from tqdm import tqdm

from cache.csv_file import read_csv
from cache.image_list import MAX_FPS, MAX_FRAMES, Sample, different_prompts, write_samples
from common.arguments import Parser, between, positive
from common.errors import UserError, run_script
from preprocessing.classes import read_synsets
from preprocessing.clip_list import cut_windows, keep_usable
from preprocessing.image_folder import FILMS, few, file_names, find_captions

VAL_LABELS, SYNSETS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    root = "root: holds [ILSVRC/]Data/CLS-LOC/{split}/ or {split}/"
    source.add_argument("--imagenet", type=Path, help=root)
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="images with captions or in class folders"
    )
    source.add_argument("--videos", type=Path, metavar="FOLDER", help="films with captions")
    add("--frames", type=between(1, MAX_FRAMES), help="of --videos: frames of a clip, 4 k + 1")
    add("--fps", type=rate, help="of --videos: frames a second")
    add("--windows", type=between(1, 10_000), help="of --videos: clips of each film (default 1)")
    add("--split", help="of --imagenet: train (default) or val")
    add("--per-class", type=positive, help="images of each class (default 200)")
    add("--count", type=positive, help="captioned images or films (default: all that are not held out)")
    add("--out", type=Path, required=True, help="the CSV to write")
    held = "so many others, of each class or of the captioned images, go to --hold-out-csv"
    add("--hold-out", type=positive, metavar="N", help=held)
    add("--hold-out-csv", type=Path, metavar="FILE", help="a second CSV, for evaluation")
    add("--seed", type=between(0, 2**62), default=0, help="which images are chosen (default 0)")
    listed = (
        f"file of all synsets: {SYNSETS} or imagenet_class_index.json (default: {SYNSETS} beside the images, else the class "
        "folders)"
    )
    add("--classes", type=Path, help=listed)
    labels = f"labels of a val folder without class folders (default: {VAL_LABELS})"
    add("--val-labels", type=Path, help=labels)
    args = parser.parse_args(argv)
    if (args.hold_out is None) != (args.hold_out_csv is None):
        raise UserError("--hold-out N and --hold-out-csv FILE belong together: give both, or neither")
    if args.hold_out_csv and os.path.abspath(args.hold_out_csv) == os.path.abspath(args.out):
        raise UserError(f"--out and --hold-out-csv are both {args.out}: give two files")
    if args.videos:
        check_frames(args)
        refuse_options(args, "is for images", "split", "val_labels", "per_class", "classes")
        captions, infos = keep_usable(args.videos, find_captions(args.videos, FILMS), args.frames, args.fps)
    else:
        refuse_options(args, "is for --videos", "frames", "fps", "windows")
        captions = find_captions(args.images) if args.images else None
    if args.images:
        refuse_options(args, "is for --imagenet", "split", "val_labels")
    if captions is None:
        refuse_options(args, "is for captioned images: give --per-class", "count")
        samples, held_out, what = choose_of_classes(args)
    else:
        refuse_options(args, "is for classes, and these images have captions", "per_class", "classes")
        samples, held_out, what = choose_captioned(args, captions)
    if len({sample.id for sample in samples + held_out}) != len(samples + held_out):
        source = args.imagenet or args.images or args.videos
        raise UserError(f"{source} holds files that differ only in their extension: ids would not be unique")
    if args.videos:
        names = {os.path.splitext(name)[0]: name for name in infos}
        films = len(samples)
        samples, held_out = (cut_windows(part, infos, names, args) for part in (samples, held_out))
        what = f"clips of {films} {what}"
    write_samples(args.out, samples)
    also = ""
    if held_out:
        write_samples(args.hold_out_csv, held_out)
        also = f"; {len(held_out)} others in {args.hold_out_csv}"
    print(f"{args.out}: {len(samples)} {what}{also}")


def check_frames(args: argparse.Namespace) -> None:
    """Check the options of --videos, and fill in the default of --windows."""
    if args.frames is None or args.fps is None:
        raise UserError("--videos needs --frames N and --fps F: give both")
    if (args.frames - 1) % 4:
        below = args.frames - (args.frames - 1) % 4
        raise UserError(
            f"--frames {args.frames} is not 4 k + 1, as video autoencoders need: use {below} or {below + 4}"
        )
    args.windows = args.windows or 1


def rate(text: str) -> float:
    """An argparse type: frames a second."""
    if not 0 < (value := float(text)) <= MAX_FPS:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {MAX_FPS}, not {text:.40}")
    return value


def refuse_options(args: argparse.Namespace, why: str, *names: str) -> None:
    """Raise `UserError` for the first of these options that was given."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {why}: leave it out")


def choose_captioned(
    args: argparse.Namespace, captions: dict[str, str]
) -> tuple[list[Sample], list[Sample], str]:
    """Return the chosen images or films, those held out, and what they are."""
    folder, article, noun = (args.videos, "a", "film") if args.videos else (args.images, "an", "image")
    names = sorted(captions)
    random.Random(f"{args.seed}/captioned").shuffle(names)
    found = [
        Sample(os.path.splitext(name)[0], os.path.join(folder, name), prompt=captions[name]) for name in names
    ]
    held = args.hold_out or 0
    if (args.count or 1) + held > len(found):
        asked = f"--count {args.count}" if args.count else f"{article} {noun} to train on"
        raise UserError(
            f"{folder} has {len(found)} captioned {noun}s, fewer than {asked}{f' and --hold-out {held}' * bool(held)}: "
            "ask for fewer"
        )
    # Those held out are the last, so that a longer list still begins with the shorter one.
    samples = found[: len(found) - held][: args.count]
    what = f"captioned {noun}s, {len(different_prompts(samples))} different prompts"
    return samples, found[len(found) - held :], what


def choose_of_classes(args: argparse.Namespace) -> tuple[list[Sample], list[Sample], str]:
    """Return the chosen images of every class that has enough, those held out, and what they are."""
    root = args.imagenet or args.images
    folder = find_split(root, "train" if args.split is None else args.split) if args.imagenet else root
    classes = args.classes or find_beside(root, SYNSETS)
    # The file is read before the long scan, so that damage is reported at once.
    synsets = read_synsets(classes) if classes else None
    found = images_by_synset(folder, args.val_labels, root)
    if synsets is None:
        synsets = sorted(found)
    else:
        check_synsets(folder, found, synsets, classes)
    count, held = args.per_class or 200, args.hold_out or 0
    chosen, others = {}, []
    for class_id, synset in enumerate(synsets):
        names = found[synset]
        if len(names) < count + held:
            fewer = f"fewer than {count}{f' and {held} to hold out' * bool(held)}"
            print(f"class {class_id} ({synset}) has {len(names)} images, {fewer}: skipped", file=sys.stderr)
            continue
        # All names are shuffled, not only those chosen, so that a longer list begins with the shorter one.
        random.Random(f"{args.seed}/{synset}").shuffle(names)
        chosen[class_id], last = (
            [
                Sample(f"{synset}/{Path(name).stem}", os.path.join(folder, name), class_id, synset)
                for name in part
            ]
            for part in (names[:count], names[len(names) - held :])
        )
        others.append(last)
    if not chosen:
        most = max(map(len, found.values())) - held
        todo = (
            f"lower --per-class, to {most} at most"
            if most > 0
            else f"there are {'too few' if most + held else 'none'}, so check the folder{' and --split' * bool(args.imagenet)}"
        )
        raise UserError(f"no class of {folder} has {count}{f' + {held}' * bool(held)} images: {todo}")
    # Each round has one image of every class.
    samples = [images[rank] for rank in range(count) for images in chosen.values()]
    held_out = [images[rank] for rank in range(held) for images in others]
    skipped, by = len(synsets) - len(chosen), classes or f"the classes found in {folder}"
    return (
        samples,
        held_out,
        f"images, {count} of each of {len(chosen)} classes ({skipped} skipped), numbered by {by}",
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
    loose = file_names(folder)
    if not synsets:
        return sort_by_labels(folder, loose, labels, root)
    if labels:
        raise UserError(f"{folder} has class folders, which say the labels: leave --val-labels out")
    if loose:
        print(f"{folder}: {len(loose)} images beside the class folders are not used", file=sys.stderr)
    found = {}
    for synset in tqdm(synsets, desc="classes", unit="class", disable=None):  # None: a bar only on a terminal
        # Only folders are read: opening or checking each of 1.3 million files would take minutes on a network disk.
        found[synset] = [f"{synset}/{name}" for name in file_names(folder / synset)]
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


if __name__ == "__main__":
    run_script(main)
