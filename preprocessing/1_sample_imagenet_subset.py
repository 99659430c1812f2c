"""Script 1: choose the images: the same number of each class, as a CSV `id, img_path, class_id, synset`.

    python preprocessing/1_sample_imagenet_subset.py --imagenet ILSVRC --split train --per-class 200 \\
        --out data/imagenet/train_200k.csv

Reads ILSVRC/Data/CLS-LOC/{train,val}/{synset}/*.JPEG, or any folder {split}/{class}/ of images. class_id is the place of the
synset in sorted order. Reproducible by --seed; rows go round the classes, so that with the same seed the list of 200 per
class is the beginning of the list of 500.
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

from errors import UserError, run_script
from preprocessing.options import new_parser, positive
from preprocessing.samples import Sample, write_samples

EXTENSIONS = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--imagenet", type=Path, required=True, help="root: holds Data/CLS-LOC/{split}/ or {split}/"
    )
    parser.add_argument("--split", default="train", help="train (default) or val")
    parser.add_argument("--per-class", type=positive, default=200, help="images of each class (default 200)")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--seed", type=int, default=0, help="which images are chosen (default 0)")
    args = parser.parse_args(argv)

    folder = find_split(args.imagenet, args.split)
    synsets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not synsets:
        raise UserError(
            f"{folder} holds no class folders ({{synset}}/*.JPEG was expected); the flat val folder of the ILSVRC download "
            "must be sorted into them first"
        )
    chosen, short = {}, []
    for class_id, synset in enumerate(synsets):
        names = sorted(
            entry.name
            for entry in os.scandir(folder / synset)
            if Path(entry.name).suffix.lower() in EXTENSIONS
        )
        if len(names) < args.per_class:
            short.append(
                f"class {class_id} ({synset}) has {len(names)} images, fewer than {args.per_class}: skipped"
            )
            continue
        random.Random(f"{args.seed}/{synset}").shuffle(names)
        chosen[class_id] = [
            Sample(f"{synset}/{Path(name).stem}", str(folder / synset / name), class_id, synset)
            for name in names
        ]
    for line in short:
        print(line, file=sys.stderr)
    if not chosen:
        raise UserError(f"no class of {folder} has {args.per_class} images: lower --per-class")
    samples = [images[rank] for rank in range(args.per_class) for images in chosen.values()]
    if len({sample.id for sample in samples}) != len(samples):
        raise UserError(f"{folder} holds files that differ only in their extension: ids would not be unique")
    write_samples(args.out, samples)
    print(
        f"{args.out}: {len(samples)} images, {args.per_class} of each of {len(chosen)} classes ({len(short)} skipped)"
    )


def find_split(root: Path, split: str) -> Path:
    """The folder of class folders: ILSVRC's layout first, then a plain ImageFolder tree."""
    candidates = [root / "Data" / "CLS-LOC" / split, root / split]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UserError(f"no {split} images: neither {candidates[0]} nor {candidates[1]} exists")


if __name__ == "__main__":
    run_script(main)
