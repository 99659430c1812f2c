"""Make the demo's data: real images and small trained models, in the formats of the full-size ones.

It needs only a CPU and about a minute, and writes:

    OUT/ILSVRC/Data/CLS-LOC/{train,val}/...  scikit-learn's handwritten digits in ImageNet's layout
    OUT/captioned/                           64 of the digits with captions, such as "a handwritten three, bold"
    OUT/imagenet_classes.json                class index -> name
    OUT/models/sd15-mini/                    a Stable Diffusion folder; its U-Net is untrained
    OUT/models/dinov2-mini/                  the teacher
    OUT/models/classifier/                   an independent classifier, which judges generated images
    OUT/models/dinov2-selfdistilled/         with --self-distilled: a teacher made without labels, 2 minutes
    OUT/models/sd3-digits/                   with --transformer: a Stable Diffusion 3 folder; its small MMDiT is untrained
    OUT/turned/Data/CLS-LOC/...              with --transformer: the digits, turned by a quarter
    OUT/models/classifier-turned/            with --transformer: the judge of these
    OUT/models/NAME-mini/                    with --family NAME --quick: a tiny pipeline of that family instead, untrained
    OUT/clips/{train,val}/                   with --moving, in a folder of its own: films, such as "a three moving left"
    OUT/models/ltx-moving/                   with --moving: an LTX-Video folder; its transformer is untrained
    OUT/models/dinov2-moving/                with --moving: the teacher of its frames
    OUT/models/{digit,motion}-judge/         with --moving: independent classifiers, of frames and of whole clips
    OUT/models/quality.json                  the measured quality of each model, its floor, and the seconds it took

After an interruption, run the same command again: it makes only what is missing. On one machine the same seed gives
the same weights, byte for byte.

    python preprocessing/0_make_demo.py --out data/demo
    python preprocessing/0_make_demo.py --out data/moving --moving
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import Parser, between
from common.errors import UserError, run_script
from common.files import write_json
from common.reading import read_record
from miniature import digits
from miniature import make as miniature

CLIPS = 20  # films of digits in motion, with --family
AGAIN = "delete the folder that holds it, and the same command makes it again"


def main(argv: list[str] | None = None) -> None:
    """Make whatever is missing under `--out`, then print the measured quality of each model."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder (default: data/demo, or data/moving with --moving)")
    add("--seed", type=between(0, 2**62), default=0, help="of split, weights and training (default: 0)")
    add("--quick", action="store_true", help="a few images and steps, floors not enforced: for tests only")
    add(
        "--family",
        metavar="NAME",
        help="with --quick: a tiny pipeline of this family instead of Stable Diffusion 1.5's",
    )
    add("--self-distilled", action="store_true", help="also a second teacher, trained without labels")
    add("--transformer", action="store_true", help="also what the study of a transformer needs")
    add(
        "--moving",
        action="store_true",
        help="instead: films of moving digits and small models of videos, 5 minutes",
    )
    args = parser.parse_args(argv)

    if args.moving and (args.family is not None or args.self_distilled or args.transformer):
        parser.error(
            "--moving makes a folder of its own: leave out --family, --self-distilled and --transformer"
        )
    if args.family is not None:
        from models.families.table import family_named

        family_named(args.family)
        if not args.quick or args.self_distilled or args.transformer:
            parser.error(
                "--family makes a pipeline of random weights: give --quick, and neither --self-distilled nor --transformer"
            )
    if args.out is None:
        args.out = Path("data/moving" if args.moving else "data/demo")
    settings = {"seed": args.seed, "quick": args.quick}
    kind = {"family": args.family} if args.family else {"moving": True} if args.moving else {}
    claim(args.out, settings | kind)
    quality = args.out / miniature.QUALITY
    asked = ["dinov2-selfdistilled"] * args.self_distilled + [*miniature.DERIVED] * args.transformer
    names = miniature.wanted(args.out, asked, args.family, args.moving)
    images = [digits.IMAGES, digits.CAPTIONED, *[digits.TURNED] * args.transformer]
    pictures = ["clips"] if args.moving else images
    missing = [name for name in names if not (args.out / "models" / name).is_dir()]
    whole = not missing and quality.exists() and all((args.out / folder).is_dir() for folder in pictures)
    if whole and list(read_record(quality, miniature.Quality, AGAIN)["models"]) == names:
        print(f"{args.out} is already complete")
        return

    started = time.perf_counter()
    if args.moving:
        make_moving_clips(args.out, settings)
    else:
        make_pictures(args.out, settings, args.family, images)
    for derived in (False, True):
        made = [name for name in missing if (name in miniature.DERIVED) == derived]
        make_models(made, args.out, settings)
    summarise(names, args.out, settings)
    print(f"{args.out} is complete, {time.perf_counter() - started:.0f} s")


def make_pictures(out: Path, settings: dict, family: str | None, images: Sequence[str]) -> None:
    """Make what is missing of the folders of `images`, and of a family's clips."""
    started = time.perf_counter()
    write_json(out / miniature.CLASSES, dict(enumerate(digits.CLASS_NAMES)))
    for kind in images:
        if (out / kind).is_dir():
            continue
        if kind == digits.CAPTIONED:
            digits.make_captioned(out, settings["seed"])
        else:
            digits.make_images(out, **settings, kind=kind)
    print(f"{'images':<22}{time.perf_counter() - started:5.1f} s", flush=True)
    if family is not None and not (out / "clips").is_dir():
        from miniature.clips import make_clips

        make_clips(out, CLIPS, digits.CLASS_NAMES, settings["seed"])


def make_moving_clips(out: Path, settings: dict) -> None:
    """Make the films of moving digits, unless they are there."""
    if (out / "clips").is_dir():
        return
    from miniature.moving import make_clips

    started = time.perf_counter()
    make_clips(out, digits.CLASS_NAMES, **settings)
    print(f"{'clips':<22}{time.perf_counter() - started:5.1f} s", flush=True)


def claim(out: Path, settings: dict) -> None:
    """Create `out`, or raise `UserError` unless this script made it with the same settings: it may be somebody's ImageNet."""
    record = out / miniature.SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if record.exists():
            made = read_record(record, miniature.Settings, f"delete {out}, and it is made again")
            if made != settings:
                raise UserError(
                    f"{out} was made with {made}, not {settings}; choose another --out or delete it"
                )
        elif foreign := [path.name for path in out.iterdir() if not path.name.startswith(".")]:
            raise UserError(f"{out} holds something else ({foreign[0]}); choose another --out")
        else:
            write_json(record, settings)
        (out / "models").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use --out {out}: {error}") from error


def make_models(names: list[str], out: Path, settings: dict) -> None:
    """Make the named models: with `quick` in this process, otherwise in two processes of one thread each."""
    if settings["quick"]:
        for name in names:
            report(name, miniature.make_model(name, out, **settings))
        return
    spawn, workers = multiprocessing.get_context("spawn"), min(2, max(1, len(names)))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=die_with_parent) as pool:
        jobs = {pool.submit(miniature.make_model, name, out, **settings): name for name in names}
        try:
            for job in as_completed(jobs):
                report(jobs[job], job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def die_with_parent() -> None:
    """End this process when its parent has ended, so that no process goes on writing after a run was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def report(name: str, measures: dict[str, float]) -> None:
    """Print one line about a finished model: its name, its seconds and its measures."""
    listed = "  ".join(f"{key} {value:.3f}" for key, value in measures.items() if key != "seconds")
    print(f"{name:<22}{measures['seconds']:5.1f} s  {listed}", flush=True)


def summarise(names: list[str], out: Path, settings: dict) -> None:
    """Collect the named models' measures into `models/quality.json` and print them as a table."""
    files = {name: out / "models" / name / "quality.json" for name in names}
    models = {name: read_record(file, dict[str, float], AGAIN) for name, file in files.items()}
    own = {name: floors for name, floors in miniature.OWN_FLOORS.items() if name in names}
    content = settings | {
        "floors_enforced": not settings["quick"],
        "floors": miniature.floors_of(names[0], own=False),
    }
    content |= ({"own_floors": own} if own else {}) | {"models": models}
    write_json(out / miniature.QUALITY, content)
    print(f"\n{'model':<22}{'measure':<24}{'value':>8}{'floor':>8}")
    for name, measures in models.items():
        floors = {} if settings["quick"] else miniature.floors_of(name)
        for key, value in measures.items():
            floor = f"{floors[key]:g}" if key in floors else ""
            print(f"{name:<22}{key:<24}{value:>8.3f}{floor:>8}")


if __name__ == "__main__":
    run_script(main)
