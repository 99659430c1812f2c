"""Train a set of variants over several seeds, evaluate each, and write a table (mean ± standard error, n) and a figure.

    python ablate_sd15.py configs/ablations/urepa.yaml configs/ablations/baseline.yaml configs/ablations/token_only.yaml \\
        --base configs/A.yaml --seeds 0 1 2 --out runs/ablations

A variant ("arm") is a small YAML file that is laid over the base config. Each run is trained and evaluated by the
commands that OUT/stages.json records, each of which can be pasted; the same command goes on where one was stopped, and
draws the results anew. Results go to OUT/table.md, results.json and arms.png.
"""

import argparse
import json
import shlex
from pathlib import Path

from tqdm import tqdm

from configs.loading import load_config
from errors import UserError, run_script
from evaluation.ablation import markdown, plot_arms, summarise
from files import write_atomically, write_json
from stages import Record, Stage, run_chains
from training.run_folder import RunFolder, this_command

# What is compared, with its format in the table.
MEASURES = {
    "Fréchet distance ↓": ".2f",
    "class accuracy ↑": ".1%",
    "held-out loss ↓": ".4f",
    "CKNNA ↑": ".3f",
    "CCA ↑": ".3f",
    "head cosine": ".3f",
}
DIFFERENCES = ("Fréchet distance ↓", "held-out loss ↓")
PLOTTED = ("Fréchet distance ↓", "held-out loss ↓", "CKNNA ↑")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    arms = {Path(file).stem: file for file in args.arms}
    if len(arms) != len(args.arms):
        raise UserError("two of these files have the same name: an arm is named after its file")
    reference = args.reference or ("baseline" if "baseline" in arms else next(iter(arms)))
    if reference not in arms:
        raise UserError(f"--reference {reference} is none of the arms: {', '.join(arms)}")
    chains = [chain(args, arm, file, seed) for seed in args.seeds for arm, file in arms.items()]
    record = Record(args.out / "stages.json")
    missing = [left for stages in chains if (left := [s for s in stages if record.of(s) is None])]
    total = sum(map(len, chains))
    with tqdm(total=total, initial=total - sum(map(len, missing)), desc="stages", unit="stage") as bar:

        def ended(stage: Stage, seconds: float) -> None:
            record.add(stage, seconds)
            bar.write(f"{stage.name:40} {seconds:7.1f} s")
            bar.update()

        run_chains(missing, jobs=args.jobs, logs=args.out / "logs", ended=ended)
    results = {
        arm: {seed: measures_of(args.out / arm / f"seed{seed}") for seed in args.seeds} for arm in arms
    }
    write_results(args, results, reference)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="+", metavar="ARM.yaml", help="overlays, the first drawn first")
    parser.add_argument("--base", required=True, help="config that the arms are laid over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, OUT/ARM/seedN")
    parser.add_argument(
        "--reference", help="arm that the others are compared with (default: baseline, or the first)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1; for CPUs)")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings that win over base and arms in every run",
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0 or args.jobs < 1:
        parser.error("--seeds must be distinct and not negative, and --jobs at least 1")
    for file in args.arms:  # a wrong file is said before the first training, not before the last
        load_config([args.base, file], args.set)
    return args


def chain(args: argparse.Namespace, arm: str, file: str, seed: int) -> list[Stage]:
    """The commands of one run: train, then measure."""
    run = args.out / arm / f"seed{seed}"
    name = f"{arm} seed {seed}"
    config = load_config([args.base, file], [*args.set, f"run={run}"])
    train = ["--config", args.base, "--config", str(file), f"run={run}", f"seed={seed}", *args.set]
    fid = f"evaluate_sd15.py fid {shlex.quote(str(run))} --checkpoint newest"
    last = run / "checkpoints" / f"step-{config.train.steps:07d}"
    return [
        Stage(f"train {name}", f"train_sd15.py {shlex.join(train)}", last),
        Stage(f"fid {name}", fid, run / "eval"),
        Stage(f"align {name}", f"evaluate_sd15.py align {shlex.quote(str(run))}", run / "eval/align.json"),
    ]


def measures_of(folder: Path) -> dict[str, float | None]:
    """The measures of a finished run at its last checkpoint."""
    run = RunFolder(folder)
    last = run.checkpoint_steps()[-1]
    found = [json.loads(path.read_text()) for path in (run.path / "eval").glob("fid_*.json")]
    wanted = run.config.eval.model_dump()
    ours = [
        result
        for result in found
        if result["step"] == last
        and all(wanted.get(k, v) == v for k, v in result["conditions"].items() if k != "extractor")
    ]
    if len(ours) != 1:
        raise UserError(
            f"{run.path}/eval holds {len(ours)} results of step {last} with the run's own eval settings"
        )
    align = json.loads((run.path / "eval" / "align.json").read_text())
    values = (
        ours[0]["value"],
        ours[0]["class_accuracy"],
        align["heldout_loss_diff"],
        align["cknna"]["cknna"],
        align["cca"]["mean_rho"],
        align["head_cosine"],
    )
    return dict(zip(MEASURES, values, strict=True))


def write_results(args: argparse.Namespace, results: dict, reference: str) -> None:
    table = summarise(results, reference)
    text = markdown(table, MEASURES, DIFFERENCES)
    seeds = f"mean ± standard error over {len(args.seeds)} seed{'s' if len(args.seeds) > 1 else ''}"
    note = f"{seeds}; differences from {reference}, seed by seed. `{this_command()}`"
    write_atomically(args.out / "table.md", f"{text}\n\n{note}\n".encode())
    write_json(
        args.out / "results.json",
        {"command": this_command(), "reference": reference, "results": results, "summary": table},
    )
    plot_arms(
        args.out / "arms.png",
        results,
        reference,
        {name: name for name in PLOTTED},
        f"seeds (dots) and their mean ± standard error; dashed: {reference}",
    )
    print(f"{text}\n\n{note}\n{args.out / 'arms.png'}")


if __name__ == "__main__":
    run_script(main)
