"""Evaluate runs of train_sd15.py: draw samples, compare them with real images, measure the alignment, compare runs.

    python evaluate_sd15.py sample runs/A                       # images of fixed seeds and labels, EMA weights
    python evaluate_sd15.py fid runs/A                          # Fréchet distance of those samples to the training images
    python evaluate_sd15.py align runs/A                        # hidden features beside the teacher's, held-out images
    python evaluate_sd15.py compare runs/A runs/A_baseline --out runs/compare   # figures and one page, index.html

Everything is read from the run folder; options default to the run's own `eval` settings.
"""

import argparse
import json
from pathlib import Path

from errors import UserError, run_script
from evaluation.alignment_rows import TIMESTEPS
from files import write_json
from training.run_folder import RunFolder, this_command

ALIKE = ("timesteps", "seed", "num_images")  # what `align` results must share to be compared


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sample,fid,align,compare}")
    for name, (run, add_options) in COMMANDS.items():
        doc = run.__doc__
        command = commands.add_parser(
            name,
            help=doc.split("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.run(args)


def sample(args: argparse.Namespace) -> None:
    """Draw images of fixed seeds and balanced labels from a run.

    Image i has the seed --seed + i and the class i mod n_classes, whatever the batch size. Images go to
    RUN/samples/SETTINGS/, one folder for each setting; the same command draws only what is missing.
    """
    from sample_sd15 import draw_samples

    run = RunFolder(args.folder)
    for step in steps_of(run, args.checkpoint):
        draw_samples(run, protocol_of(run, args, step), args.device)


def fid(args: argparse.Namespace) -> None:
    """Fréchet distance between a run's samples and the real training images.

    Features come from --extractor, and the metric carries its name: `fd_classifier` is no Inception FID. Draws the samples
    first if they are missing. The distance between two halves of the real images is given for scale. The result goes to
    RUN/eval/fid_SETTINGS.json.
    """
    from device import pick_device
    from evaluation.features import load_extractor
    from fid_sd15 import measure_distance, read_reference
    from sample_sd15 import draw_samples, setting_name

    run = RunFolder(args.folder)
    path = args.extractor or run.config.eval.extractor
    if path is None:
        raise UserError("no feature extractor: set eval.extractor in the config or give --extractor FOLDER")
    extractor = load_extractor(path, pick_device(args.device))
    protocols = [protocol_of(run, args, step) for step in steps_of(run, args.checkpoint)]
    folders = [draw_samples(run, protocol, args.device) for protocol in protocols]
    reference = read_reference(run.config, extractor)
    for protocol, folder in zip(protocols, folders, strict=True):
        result = measure_distance(folder, protocol, extractor, reference)
        result["conditions"]["extractor"] = str(path)
        result["command"] = this_command()
        write_json(run.path / "eval" / f"fid_{Path(path).name}_{setting_name(protocol)}.json", result)
        print(
            f"{run.name} step {result['step']}: {result['conditions']['metric']} {result['value']:.2f}, class accuracy "
            f"{result['class_accuracy']:.1%} ({result['num_samples']} samples against {reference.real.count} real images)"
        )


def align(args: argparse.Namespace) -> None:
    """Measure on held-out images how much of the teacher a run's hidden features hold, beside its bare base model's.

    At all three taps and several timesteps, before and after the heads: held-out CCA, CKNNA, unbiased CKA, a ridge map's
    cosine and R², the head's cosine, iREPA's spatial metrics and a linear probe, each with its null
    (evaluation/alignment_rows.py); and the held-out diffusion loss. EMA weights, the null prompt, and for each image the
    same noise. Everything is fitted on one half of the images and reported on the other.
    Writes to RUN/eval: align.json, align_timesteps.png, and align_tsne.png (a joint t-SNE at one timestep).
    """
    from align_sd15 import bare_base, checked_timesteps, draw_alignment, measure_alignment, summary
    from build_sd15 import load_run_model
    from device import pick_device
    from evaluation.embedding import insist_installed

    run = RunFolder(args.folder)
    step = steps_of(run, args.checkpoint)[-1]
    seed = run.config.eval.seed if args.seed is None else args.seed
    if seed < 0:
        raise UserError("--seed must not be negative")
    checked_timesteps(args.timesteps)
    insist_installed(args.embedding)
    device = pick_device(args.device)
    models = {"run": load_run_model(run, step, device)[0], "base": bare_base(run.config, device)}
    measured, sources = measure_alignment(
        run.config, models, timesteps=args.timesteps, seed=seed, device=device, num_images=args.num_images
    )
    result = {"step": step, "command": this_command()} | measured
    folder = run.path / "eval"
    write_json(folder / "align.json", result)
    draw_alignment(folder, run.name, result, sources, class_names=names_of(run), embedding=args.embedding)
    print(f"{run.name} step {step}, {result['num_images']} of {result['num_available']} held-out images")
    print(summary(result))


def compare(args: argparse.Namespace) -> None:
    """Draw runs side by side and write one self-contained page, OUT/index.html.

    Needs what `fid` and `align` wrote of each run. --times adds the durations of a JSON list of stages.
    """
    from evaluation.report import RunFacts, comparable, write_report
    from evaluation.sampling import load_images

    runs = [RunFolder(folder) for folder in args.folders]
    names = label_of(runs)
    results = {names[run]: results_of(run) for run in runs}
    distances = comparable({name: found for name, (found, _) in results.items()})
    if len({json.dumps([alignment[key] for key in ALIKE]) for _, alignment in results.values()}) > 1:
        raise UserError(
            "`align` was run with other options on these runs: run it on each with the same --timesteps, --num-images, --seed"
        )
    try:
        times = json.loads(args.times.read_text()) if args.times else []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --times {args.times}: {error}") from None
    facts = {}
    for run in runs:
        last = max(distances[names[run]], key=lambda result: result["step"])
        facts[names[run]] = RunFacts(
            settings=run.settings(),
            command="; ".join(run.commands()),
            metrics=run.metrics(),
            distances=distances[names[run]],
            alignment=results[names[run]][1],
            tsne=run.path / "eval" / "align_tsne.png",
            samples=load_images(last["samples"], min(100, last["num_samples"])),
        )
    page = write_report(args.out, facts, class_names=names_of(runs[0]), times=times, command=this_command())
    print(page)


def label_of(runs: list[RunFolder]) -> dict[RunFolder, str]:
    """What figures call each run: its folder's name, or the last two names where that would not tell them apart."""
    for parts in (1, 2):
        names = {run: "/".join(run.path.resolve().parts[-parts:]) for run in runs}
        if len(set(names.values())) == len(runs):
            return names
    raise UserError(
        "two of these run folders have the same name: rename one, so that figures can tell them apart"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder of train_sd15.py")
    parser.add_argument("--checkpoint", default="newest", help="step, newest (default) or all")
    parser.add_argument("--seed", type=int, help="first seed (default: eval.seed)")
    parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--num-samples", type=int, help="images (default: eval.num_samples)")
    parser.add_argument("--sampling-steps", type=int, help="DDIM steps (default: eval.sampling_steps)")
    parser.add_argument("--cfg", type=float, help="guidance scale, 1 = unguided (default: eval.cfg)")
    parser.add_argument(
        "--guidance-high", type=float, help="guide only up to this noise level (default: eval.guidance_high)"
    )
    parser.add_argument(
        "--guidance-space",
        choices=["snr", "index"],
        help="a noise level is REPA's time of equal signal-to-noise ratio (snr), or the share of the DDPM index",
    )
    parser.add_argument("--raw", action="store_true", help="use the raw weights instead of their EMA")


def add_fid_options(parser: argparse.ArgumentParser) -> None:
    add_sampling_options(parser)
    parser.add_argument("--extractor", help="image-classifier folder (default: eval.extractor)")


def add_align_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        default=TIMESTEPS,
        metavar="T",
        help=f"noise levels, 0 (clean) to 999 (default {' '.join(map(str, TIMESTEPS))})",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        help="held-out images, in eval.csv's order (default: 1000, or all there are)",
    )
    parser.add_argument(
        "--embedding",
        choices=["tsne", "umap"],
        default="tsne",
        help="umap also draws align_umap.png (pip install umap-learn)",
    )


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="run folders; the first is drawn first"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and its figures")
    parser.add_argument(
        "--times",
        type=Path,
        help="JSON list of {stage, seconds, command, group}; stages of one group ran side by side",
    )


COMMANDS = {
    "sample": (sample, add_sampling_options),
    "fid": (fid, add_fid_options),
    "align": (align, add_align_options),
    "compare": (compare, add_compare_options),
}


def steps_of(run: RunFolder, which: str) -> list[int]:
    """The steps of the checkpoints that `--checkpoint` names."""
    steps = run.checkpoint_steps()
    if not steps:
        raise UserError(
            f"{run.path} has no checkpoint yet: train_sd15.py writes one every train.checkpoint_every steps"
        )
    if which in ("all", "newest"):
        return steps if which == "all" else steps[-1:]
    if which not in map(str, steps):
        raise UserError(f"{run.path} has no checkpoint of step {which}; it has {', '.join(map(str, steps))}")
    return [int(which)]


def protocol_of(run: RunFolder, args: argparse.Namespace, step: int) -> dict:
    """Everything that decides what the samples are; the options win over the run's own eval settings."""
    chosen = {
        name: getattr(run.config.eval, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("num_samples", "sampling_steps", "cfg", "guidance_high", "guidance_space", "seed")
    }
    if not 0 <= chosen["guidance_high"] <= 1:
        raise UserError("--guidance-high is a noise level between 0 (clean) and 1 (noise)")
    if (
        chosen["num_samples"] < 2
        or not 1 <= chosen["sampling_steps"] <= 1000
        or chosen["cfg"] < 1
        or chosen["seed"] < 0
    ):
        raise UserError(
            "sampling needs --num-samples ≥ 2, --sampling-steps 1 to 1000, --cfg ≥ 1 and --seed ≥ 0"
        )
    return {"step": step, "weights": "raw" if args.raw else "ema", "sampler": "ddim", **chosen}


def names_of(run: RunFolder) -> dict[int, str]:
    """Names of the classes that a run learns from."""
    from preprocessing.manifest import class_names, read_manifest

    return class_names(read_manifest(run.config.data.text, "text"))


def results_of(run: RunFolder) -> tuple[list[dict], dict]:
    """What `fid` and `align` wrote of a run; raises `UserError` for what is missing."""
    distances = [json.loads(path.read_text()) for path in sorted((run.path / "eval").glob("fid_*.json"))]
    alignment = run.path / "eval" / "align.json"
    for name, found in (("fid", distances), ("align", alignment.exists())):
        if not found:
            raise UserError(
                f"{run.path} has not been evaluated: run `python evaluate_sd15.py {name} {run.path}` first"
            )
    return distances, json.loads(alignment.read_text())


if __name__ == "__main__":
    run_script(main)
