"""Evaluate runs of train.py, their checkpoints, or the bare base model.

    python evaluate.py curve runs/A runs/A_baseline configs/A.yaml    # metrics of every checkpoint, cheap protocol
    python evaluate.py final runs/A runs/A_baseline                   # the plan's protocol, and a guidance sweep
    python evaluate.py final runs/A eval.num_samples=50000            # every subcommand takes settings of eval
    python evaluate.py align runs/A                                   # CCA, CKA, CKNNA … on held-out images
    python evaluate.py pictures runs/A runs/A_baseline -o pictures.png
    python evaluate.py report runs/A runs/A_baseline configs/A.yaml -o report.html
    accelerate launch --num_processes 4 evaluate.py curve runs/A      # sampling and features by several processes

A RUN is a run folder, one checkpoint's folder in it, or a config: the bare base model that it names, whose results go to the
folder RUN_base. Settings of `eval` are overridden by key=value, which --help of a subcommand lists. What was drawn or measured
is not done again: the same command goes on where one was stopped.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from common.arguments import Parser
from common.device import pick_device
from common.errors import UserError
from common.files import write_json
from common.reading import read_record
from common.stages import StageEntry
from configs.loading import eval_changes, eval_settings
from evaluation.align import align_target
from evaluation.image_files import PICTURES, image_chunks, load_images
from evaluation.options import add_options, split_settings
from evaluation.pictures import draw_pictures
from evaluation.points import evaluate_all, format_metrics, points_of
from evaluation.report import make_report
from evaluation.sample import clip_settings, draw_samples, noun_of
from evaluation.score import make_references, measure_images
from evaluation.targets import Target, find_baseline, find_targets, open_run, run_labels
from metrics.embedding import check_installed
from metrics.npz_images import write_npz_images
from report.curves import draw_curves, format_speedup
from report.records import points_under
from training.parts import family_for
from training.ranks import Ranks, run_ranks
from training.run_folder import this_command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, doc=run.__doc__, help=run.__doc__.split("\n")[0])
        add_options(command, name)
        command.set_defaults(run=run)
    settings, others = split_settings(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(others)
    args.changes = eval_changes(settings)
    args.run(args)


def sample(args: argparse.Namespace) -> None:
    """Draw images of fixed seeds.

    Image i starts from the noise of seed + i and shows class i mod n, whatever the batch size, the number of images or of
    processes. Images go to RUN/samples/SETTINGS/ with a manifest of every setting and a log of their checksums; two settings
    never share a folder, only what is missing is drawn, and a picture that something else put there is refused. --npz writes
    them as one file for ADM's evaluator too. A clip is one PNG of its frames side by side; the first 16 are films
    (.mp4) too.
    """
    device, ranks = open_device(args)
    targets = [*chain(*targets_of(args))]
    if args.npz and any(clip_settings(target.config) for target in targets):
        raise UserError("--npz is for images, and these are clips: leave it out")
    for target in targets:
        indices = range(target.settings.num_samples)
        folder, recipe = draw_samples(target, device, indices, ranks)
        if args.npz and ranks.main:
            file = folder.with_name(f"{folder.name}_{len(indices)}.npz")
            shape = load_images(folder, [0]).shape[1:3]
            write_npz_images(file, image_chunks(folder, indices, 128), len(indices), shape)
            print(f"{file}: {len(indices):,} images as arr_0")
        if ranks.main:
            print(f"{folder}: {len(indices):,} {noun_of(recipe)}", flush=True)


def metrics(args: argparse.Namespace) -> None:
    """Measure FID, sFID, IS, precision, recall and KID of a run's samples, or of any images.

    Draws the samples first if they are missing. A RUN may also be a folder of images, or an .npz of them (arr_0) such as ADM's
    published samples: then eval.reference is needed, and --out FILE.json keeps the numbers. Metrics carry protocol and number
    of images in their names (adm_fid10k, clean_fid10k, classifier_fd300); those of different names do not compare. Results of
    runs go to RUN/eval/points.jsonl.
    """
    device, ranks = open_device(args)
    images = [path for path in args.runs if is_images(path)]
    if args.out is not None and (args.out.suffix != ".json" or len(images) != 1):
        raise UserError(f"--out {args.out}: give a file that ends in .json, and one folder or .npz of images")
    for path in images if ranks.main else ():
        found = measure_images(path, eval_settings(args.changes), device)
        print(f"{path}: {format_metrics(found['metrics'])}")
        if args.out is not None:
            write_json(args.out, found | {"command": this_command()})
    args.runs = [path for path in args.runs if path not in images]
    if args.runs:
        evaluate_all([*chain(*targets_of(args, alike=True))], device, ranks, kind="metrics")


def reference(args: argparse.Namespace) -> None:
    """Make statistics of real images, with which samples are compared (eval.reference).

    A run's training images need no such command: their statistics are made when they are first needed. This is for other
    images, such as the whole training set. Writes a file for each protocol: OUT.adm.npz and OUT.clean.npz.
    """
    device, ranks = open_device(args)
    settings = eval_settings(args.changes)
    for file in make_references(args.images, args.size, args.out, settings, device, ranks):
        if ranks.main:
            print(file)


def curve(args: argparse.Namespace) -> None:
    """Measure every checkpoint (its moving average, or with --raw its weights), and draw metrics against steps and images seen.

    All runs by one protocol, the cheap one of the first run's eval settings (configs/A.yaml: 10,000 images, 50 steps), with the
    same seeds and labels. Points are lines of RUN/eval/points.jsonl, also those that training measured (train.eval_every).
    Draws OUT/curve.png and curve_all.png, and prints after how many steps each run reached the baseline's final value.
    """
    device, ranks = open_device(args)
    groups = targets_of(args, alike=True)
    runs = [group[0].run for group in groups]
    runs = dict(zip(run_labels(runs), runs, strict=True))
    baseline = find_baseline(runs, args.baseline)
    points = evaluate_all([*chain(*groups)], device, ranks, kind="curve")
    if ranks.main:
        # Points that training measured count too, also of checkpoints that were deleted since.
        protocol = points[0]["protocol"]
        found = {label: points_under(points_of(run), protocol, ("curve",)) for label, run in runs.items()}
        out = Path("runs/curve") if args.out is None else args.out
        base_models = [label for label, run in runs.items() if run.is_base_model]
        result = draw_curves(out, found, baseline, base_models)
        print("\n".join(filter(None, [format_speedup(result), str(out / "curve.png")])))


def final(args: argparse.Namespace) -> None:
    """Measure final numbers, and metrics over guidance scales.

    Of Stable Diffusion 1.5 by the plan's protocol: 250 steps, guidance 7.5 up to noise level 0.7; of other families by the
    run's own settings. So strong a guidance saturates IS and precision and costs
    recall, so a sweep of guidance scales by the runs' own sampling settings follows (--sweep without scales leaves it out).
    eval.cfg is that of the final numbers alone; every other setting is of both. Results go to RUN/eval/points.jsonl.
    """
    device, ranks = open_device(args)
    targets = [*chain(*targets_of(args, alike=True))]
    final_targets = [
        target.with_changes(dict(family_for(target.config).final_settings) | args.changes)
        for target in targets
    ]
    # A sweep is about the scale alone: the other settings are the curve's, unless the command line says otherwise.
    sweep = [target.with_changes({"eval.cfg": scale}) for target in targets for scale in args.sweep]
    evaluate_all(final_targets, device, ranks, kind="final")
    if sweep:
        evaluate_all(sweep, device, ranks, kind="sweep")


def align(args: argparse.Namespace) -> None:
    """Measure how similar a run's hidden features are to the teacher's, on held-out images.

    Beside those of its bare base model, at all its taps and several timesteps, before and after the heads: held-out CCA, CKNNA,
    unbiased CKA, a ridge map's cosine and R², the head's cosine, iREPA's spatial metrics and a linear probe, each with its null
    (metrics/similarity_rows.py); and the held-out diffusion loss. The null prompt, and the same noise for each image.
    Everything is fitted on one half of the images and reported on the other. Writes align.json, align_timesteps.png and
    align_tsne.png to RUN/eval; of a checkpoint that is not the newest to RUN/eval/step-….
    """
    check_installed(args.embedding)
    device, _ = open_device(args)
    for group in targets_of(args):
        how = {"num_images": args.num_images, "with_base": not args.no_base, "embedding": args.embedding}
        align_target(group[-1], device, timesteps=args.timesteps, **how)


def pictures(args: argparse.Namespace) -> None:
    """Draw a picture of the same seeds from several runs.

    Rows are runs; columns are classes or, where a run has several checkpoints (--checkpoint all), steps. Nobody selects the
    images: each is the first of its class. Only the images that are shown are drawn, if they are missing.
    """
    if args.out.suffix != ".png":
        raise UserError(f"-o {args.out}: the picture's name must end in .png")
    if (beside := args.out.with_suffix(".json")).exists() and not args.out.exists():
        raise UserError(f"{beside} is there, and the picture's data would replace it: choose another -o")
    device, _ = open_device(args)
    groups = targets_of(args, alike=True)
    labels = run_labels([group[0].run for group in groups], [group[-1].step for group in groups])
    print(draw_pictures(args.out, dict(zip(labels, groups, strict=True)), device, args.prompts))


def report(args: argparse.Namespace) -> None:
    """Write one self-contained page of everything that was measured of these runs.

    Made of the records that curve, final, metrics, align and training left in the run folders; measures nothing. The figures
    are kept in PAGE_figures/ too, each with the JSON that it was drawn from. --times adds durations from a JSON list of stages.
    """
    if args.changes:
        raise UserError("`report` measures nothing: it takes no settings")
    if args.out.suffix != ".html":
        raise UserError(f"-o {args.out}: the page's name must end in .html")
    remedy = "give the record of stages that demo.py or ablate.py keeps"
    times = [] if args.times is None else read_record(args.times, list[StageEntry], remedy)
    runs = [open_run(path)[0] for path in args.runs]
    about = {"times": times, "command": this_command(), "note": args.note}
    print(make_report(args.out, runs, baseline=args.baseline, **about))


def targets_of(args: argparse.Namespace, *, alike: bool = False) -> list[list[Target]]:
    """The targets of each RUN by the command line's settings; `alike`: all by those of the first run."""
    return find_targets(args.runs, args.checkpoint, raw=args.raw, changes=args.changes, alike=alike)


def open_device(args: argparse.Namespace):
    """The device, and the rank of this process among several."""
    device = pick_device(args.device)
    return device, Ranks(cpu=device.type == "cpu")


def is_images(path: Path) -> bool:
    """Whether this is a set of images, and not a run."""
    if path.is_dir() and not (path / "config.yaml").exists():
        return any(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    return path.suffix == ".npz"


COMMANDS = {run.__name__: run for run in (sample, metrics, reference, curve, final, align, pictures, report)}


if __name__ == "__main__":
    run_ranks(main)
