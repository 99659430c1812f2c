"""The options of evaluate_sd15.py: which runs, and which settings of `eval` are others than a run's own."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from configs.evaluation import Eval
from configs.loading import knobs, with_settings
from configs.schema import Config
from evaluation.curves import SWEEP
from evaluation.targets import Target, targets_of
from metrics.similarity_rows import TIMESTEPS
from training.run_folder import RunFolder

# Option: the setting that it changes, and what argparse must know besides.
SAMPLING = {
    "--sampler": ("sampler", {"choices": ["ddim", "ddpm", "dpm++"]}),
    "--steps": ("sampling_steps", {"type": int}),
    "--eta": ("eta", {"type": float}),
    "--cfg": ("cfg", {"type": float}),
    "--guidance-space": ("guidance_space", {"choices": ["snr", "index"]}),
    "--labels": ("labels", {"choices": ["balanced", "random"]}),
    "--seed": ("seed", {"type": int}),
    "--num-samples": ("num_samples", {"type": int}),
    "--batch-size": ("batch_size", {"type": int}),
    "--precision": ("precision", {"choices": ["auto", "bf16", "fp32"]}),
}
MEASURING = {
    "--extractor": ("extractor", {}),
    "--dinov2": ("dinov2", {}),
    "--reference": ("reference", {"nargs": "+", "type": Path}),
    "--bootstrap": ("bootstrap", {"type": int}),
}
INTERVAL = (
    "guide only at noise levels in this interval, on REPA's scale from 0 (clean) to 1 (noise); the plan's is 0,0.7. In the "
    "space snr (default) a level is REPA's time of equal signal-to-noise ratio, so that 0.7 is DDPM index 605; in the space "
    "index it is the share of the index, so that 0.7 is index 700. Outside the interval no unconditional forward is computed"
)


def add_runs(parser: argparse.ArgumentParser, which: str | None = "newest", more: str = "") -> None:
    """RUN…, and unless `which` is None the checkpoint (`which` is the default) and the device."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder of train_sd15.py, a checkpoint's folder in it, or a config (.yaml) for the base model it names"
        + more,
    )
    if which is not None:
        parser.add_argument(
            "--checkpoint", default=which, metavar="STEP", help=f"a step, newest or all (default: {which})"
        )
        parser.add_argument(
            "--raw", action="store_true", help="the raw weights instead of their moving average"
        )
        parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")


def add_sampling(parser: argparse.ArgumentParser, default: str = "the run's own eval settings") -> None:
    """What decides the images."""
    group = parser.add_argument_group(f"sampling (default: {default})")
    _add_settings(group, SAMPLING)
    group.add_argument("--guidance-interval", type=_interval, metavar="LOW,HIGH", help=INTERVAL)
    group.add_argument("--compile", action="store_true", help=_meaning("compile"))


def add_measuring(parser: argparse.ArgumentParser, only: Sequence[str] = tuple(MEASURING)) -> None:
    """What decides the metrics, or some of it."""
    group = parser.add_argument_group("metrics (default: the run's own eval settings)")
    _add_settings(group, {option: MEASURING[option] for option in only})
    if "--bootstrap" not in only:
        return
    group.add_argument(
        "--discard-images", action="store_true", help="keep only the first 100 images of what was measured"
    )


def changes_of(args: argparse.Namespace) -> dict[str, object]:
    """The settings of `eval` that the command line gives, by their dotted keys."""
    changes = {
        f"eval.{setting}": value
        for option, (setting, _) in (SAMPLING | MEASURING).items()
        if (value := getattr(args, option[2:].replace("-", "_"), None)) is not None
    }
    if getattr(args, "guidance_interval", None) is not None:
        changes |= dict(zip(("eval.guidance_low", "eval.guidance_high"), args.guidance_interval, strict=True))
    if getattr(args, "compile", False):
        changes["eval.compile"] = True
    if getattr(args, "discard_images", False):
        changes["eval.keep_images"] = False
    return changes


def chosen_of(config: Config, args: argparse.Namespace, base: Mapping[str, object] = ()) -> Eval:
    """The run's settings, `base` laid over them, and the command line's over that."""
    return with_settings(config, dict(base) | changes_of(args)).eval


def targets(args: argparse.Namespace) -> list[list[Target]]:
    """The targets of each RUN, in the order given; raises `UserError` where one is given twice."""
    found = [targets_of(path, args.checkpoint, raw=args.raw) for path in args.runs]
    seen = [target for group in found for target in group]
    places = [(target.run.path.resolve(), target.step, target.weights) for target in seen]
    if len(set(places)) != len(places):
        raise UserError("a run is given twice")
    return found


def label_of(runs: Sequence[RunFolder], steps: Sequence[int] = ()) -> list[str]:
    """What figures call each run: its folder's name, or the last two names where that would not tell them apart; a run that is
    there twice also by its `steps`."""
    paths = [run.path.resolve() for run in runs]
    for parts in (1, 2):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    if steps:
        names = [f"{n} {s}" if names.count(n) > 1 else n for n, s in zip(names, steps, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(
            "two of these run folders have the same name: rename one, so that figures can tell them apart"
        )
    return names


def _add_settings(group, options: Mapping[str, tuple[str, dict]]) -> None:
    for option, (setting, more) in options.items():
        group.add_argument(option, help=_meaning(setting), **more)


def _meaning(setting: str) -> str:
    field = knobs()[f"eval.{setting}"]
    return f"{field.description} (eval.{setting})".replace("%", "%%")


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH, for instance 0,0.7") from None
    return low, high


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_sampling(parser)
    parser.add_argument(
        "--npz", action="store_true", help="write the images as one .npz (arr_0) for ADM's evaluator too"
    )


def add_metrics_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, more="; also a folder of images, or an .npz of them")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the numbers of such images and their protocol"
    )
    add_sampling(parser)
    add_measuring(parser)


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="CSV of script 1, or a folder of images")
    parser.add_argument(
        "--size", type=int, default=512, help="side of the central square that is compared (512)"
    )
    parser.add_argument("--out", type=Path, required=True, help="OUT.PROTOCOL.npz are written")
    parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")
    add_measuring(parser, ("--extractor", "--dinov2"))


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, which="all")
    parser.add_argument("--out", type=Path, help="folder of the figures (runs/curve)")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with it (the run whose λ is 0)")
    add_sampling(parser)
    add_measuring(parser)


def add_final_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=SWEEP, metavar="SCALE",
        help=f"guidance scales (default: {' '.join(f'{s:g}' for s in SWEEP)})",
    )  # fmt: skip
    add_sampling(
        parser,
        "250 steps, guidance 7.5 in 0,0.7; the rest, and all of the sweep, the run's own eval settings",
    )
    add_measuring(parser)


def add_align_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--seed", type=int, help="of noise, halves and nulls (eval.seed)")
    parser.add_argument(
        "--timesteps", type=int, nargs="+", default=TIMESTEPS, metavar="T",
        help=f"noise levels, 0 (clean) to 999 (default: {' '.join(map(str, TIMESTEPS))})",
    )  # fmt: skip
    parser.add_argument(
        "--num-images",
        type=int,
        help="held-out images, in eval.csv's order (default: 1000, or all there are)",
    )
    parser.add_argument("--no-base", action="store_true", help="leave the bare base model out")
    parser.add_argument(
        "--embedding", choices=["tsne", "umap"], default="tsne",
        help="umap also draws align_umap.png (pip install umap-learn)",
    )  # fmt: skip


def add_pictures_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG file")
    parser.add_argument(
        "--classes", type=int, nargs="+", help="classes to show (default: eight, evenly spread)"
    )
    add_sampling(parser)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, which=None)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with it (the run whose λ is 0)")
    parser.add_argument(
        "--times",
        type=Path,
        help="JSON list of {stage, seconds, command, group}; stages of one group ran side by side",
    )
