"""Train a set of variants over several seeds, evaluate each, and write a table (mean ± standard error, n) and a figure.

    python ablate.py configs/ablations/urepa.yaml configs/ablations/baseline.yaml configs/ablations/token_only.yaml \\
        --base configs/A.yaml --seeds 0 1 2 --out runs/ablations --set eval.extractor=path/to/classifier

A variant ("arm") is a small YAML file that is laid over the base config. Each run is trained and evaluated (its last
checkpoint) by the commands that OUT/stages.json records, each of which can be pasted; the same command goes on where one
was stopped, and draws the results anew: OUT/table.md, results.json and arms.png.
"""

import argparse
import shlex
from collections.abc import Mapping
from itertools import dropwhile, product
from pathlib import Path

from tqdm import tqdm

from common import plain_text
from common.arguments import Parser, between
from common.errors import UserError, run_script
from common.files import write_atomically, write_json
from common.stages import Record, Stage, run_chains
from configs.evaluation import FEWEST_MEASURED, Eval
from configs.loading import load_config, yaml_value
from configs.schema import Config
from metrics.extractors import load_extractors, load_video_classifier
from metrics.similarity_rows import NUM_IMAGES, SHOWN_TIMESTEP, value_of
from report.ablation import markdown, plot_arms, summarise
from report.records import headline, kind_of, points_file, protocols, read_alignment
from training.parts import family_for
from training.run_folder import flat_settings, this_command

# The measures that are compared, with their formats in the table.
MEASURES = {"Fréchet distance ↓": ".2f", "class accuracy ↑": ".1%", "held-out loss ↓": ".4f"}
MEASURES |= {"CKNNA ↑": ".3f", "CCA ↑": ".3f", "head cosine": ".3f"}
# Of clips, the metrics of whole clips (docs/evaluation.md); those that describe a clip are best near the value of real ones.
CLIP = "video_"
OF_CLIPS = {
    "accuracy of clips ↑": ("accuracy", ".1%"),
    "Fréchet distance of clips ↓": ("fd", ".2f"),
    "consistency": ("consistency", ".4f"),
    "warping error": ("warping_error", ".5f"),
    "flicker": ("flicker", ".3f"),
    "motion": ("motion", ".3f"),
}
DIFFERENCES = ("Fréchet distance ↓", "held-out loss ↓", "consistency", "warping error", "flicker")
PLOTTED = ("Fréchet distance ↓", "held-out loss ↓", "CKNNA ↑")

# The settings, or whole sections, that two runs must share for a measure to be compared.
IMAGES = ("eval.csv", "eval.latents")
SAMPLES = tuple(
    f"eval.{name}"
    for name in Eval.model_fields
    if name not in ("csv", "latents", "tokens", "dinov2", "batch_size", "compile", "keep_images", "bootstrap")
)
CONDITIONS = {
    "Fréchet distance ↓": (*SAMPLES, "data.csv", "data.latents"),
    "class accuracy ↑": SAMPLES,
    "held-out loss ↓": (*IMAGES, "diffusion"),
    "CKNNA ↑": (*IMAGES, "eval.tokens"),  # whatever a run was taught by
    "CCA ↑": (*IMAGES, "eval.tokens"),
    "head cosine": (*IMAGES, "eval.tokens", "teacher", "align.spatial_norm"),
} | dict.fromkeys(OF_CLIPS, (*SAMPLES, "eval.csv"))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    arms = {file.stem: file for file in args.arms}
    if len(arms) != len(args.arms):
        raise UserError("two of these files have the same name: an arm is named after its file")
    reference = args.reference or ("baseline" if "baseline" in arms else next(iter(arms)))
    if reference not in arms:
        raise UserError(f"--reference {reference} is none of the arms: {', '.join(arms)}")
    runs = {}
    for seed, (arm, file) in product(args.seeds, arms.items()):
        runs[arm, seed] = load_config([args.base, file], [*args.set, *own_settings(args, arm, seed)])
        check_measurable(arm, runs[arm, seed])
    record = Record(args.out / "stages.json")
    chains = {key: stages_of_run(args, arms[key[0]], *key, config) for key, config in runs.items()}
    left = [remaining_stages(stages, record, runs[key]) for key, stages in chains.items()]
    total = sum(map(len, chains.values()))
    with tqdm(total=total, initial=total - sum(map(len, left)), desc="stages", unit="stage") as bar:

        def ended(stage: Stage, seconds: float) -> None:
            record.add(stage, seconds)
            bar.write(f"{stage.name:40} {seconds:7.1f} s")
            bar.update()

        run_chains([chain for chain in left if chain], jobs=args.jobs, logs=args.out / "logs", ended=ended)
    results = {arm: {seed: measures_of(runs[arm, seed]) for seed in args.seeds} for arm in arms}
    conditions = {arm: conditions_of(runs[arm, args.seeds[0]]) for arm in arms}
    measured = {measure for seeds in results.values() for found in seeds.values() for measure in found}
    incomparable = {
        arm: {measure for measure in measured if found[measure] != conditions[reference][measure]}
        for arm, found in conditions.items()
    }
    write_results(args, results, reference, incomparable, runs[reference, args.seeds[0]])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, seed, many = parser.add_argument, between(0, 2**62), between(1, 1024)
    add("arms", nargs="+", type=Path, metavar="ARM.yaml", help="overlays, the first drawn first")
    add("--base", required=True, type=Path, help="config that the arms are laid over")
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--out", type=Path, required=True, help="folder of the runs, OUT/ARM/seedN")
    add("--reference", help="arm that the others are compared with (default: baseline, or the first)")
    add("--jobs", type=many, default=1, help="runs side by side (default 1; for CPUs)")
    meaning = "settings that win over base and arms in every run; give the arms before it"
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help=meaning)
    args = parser.parse_args(argv)
    if len(set(args.seeds)) != len(args.seeds):
        parser.error("--seeds must be distinct")
    for setting in args.set:
        if (key := setting.partition("=")[0]) in ("seed", "run"):
            raise UserError(f"--set {key}=… is not for an ablation: --seeds and --out decide it")
    return args


def check_measurable(arm: str, config: Config) -> None:
    """Check before the first training that the evaluation after it has everything it needs; raises `UserError`."""
    for name in ("csv", "latents", "tokens"):
        if getattr(config.eval, name) is None:
            raise UserError(f"{arm} cannot be evaluated: set eval.{name} in the base config, or by --set")
    if config.eval.num_samples < FEWEST_MEASURED:
        few = f"eval.num_samples = {config.eval.num_samples} is too few"
        raise UserError(f"{arm}: {few}: choose {FEWEST_MEASURED} or more")
    load_extractors(config.eval.extractor, "cpu", dinov2=config.eval.dinov2)
    if config.eval.video_extractor is not None:
        load_video_classifier(config.eval.video_extractor, "cpu")


def stages_of_run(args: argparse.Namespace, file: Path, arm: str, seed: int, config: Config) -> list[Stage]:
    """The stages of one run: train, then measure its last checkpoint."""
    run, steps = config.run, config.train.steps
    train = ["--config", args.base, "--config", file, *args.set, *own_settings(args, arm, seed)]
    measured = f"{shlex.quote(str(run))} --checkpoint {steps}"
    stages = (
        ("train", f"train.py {shlex.join(map(str, train))}", f"checkpoints/step-{steps:07d}"),
        ("metrics", f"evaluate.py metrics {measured}", "eval/points.jsonl"),
        ("align", f"evaluate.py align {measured} --timesteps {SHOWN_TIMESTEP} --no-base", "eval/align.json"),
    )
    return [Stage(f"{name} {arm} seed {seed}", command, run / last) for name, command, last in stages]


def own_settings(args: argparse.Namespace, arm: str, seed: int) -> list[str]:
    """The settings that tell the runs of an ablation apart."""
    return [f"run={yaml_value(str(args.out / arm / f'seed{seed}'))}", f"seed={seed}"]


def remaining_stages(stages: list[Stage], record: Record, config: Config) -> list[Stage]:
    """The stages from the first one on that was not done with this very config: each depends on those before it."""
    file = config.run / "config.yaml"
    if not file.exists() or load_config(file) != config:
        return stages  # training itself refuses a run that it cannot resume, and does nothing where it is complete
    return list(dropwhile(record.of, stages))


def last_metrics(config: Config) -> dict[str, Mapping]:
    """The metrics of a finished run at its last step, with its own evaluation settings."""
    folder, last, drawn = config.run / "eval", config.train.steps, config.eval
    sampler = family_for(config).sampler_of(drawn.sampler)
    same = {"sampler": sampler, "steps": drawn.sampling_steps, "cfg": drawn.cfg, "seed": drawn.seed}
    same |= {"labels": drawn.labels, "num_samples": drawn.num_samples, "weights": "ema"}
    points = [p for p in points_file(folder / "points.jsonl").read() if p["kind"] == "metrics"]
    ours = [p for p in points if p["step"] == last and same.items() <= p["protocol"].items()]
    if len(protocols(ours)) != 1:
        raise UserError(changed(config))
    return ours[-1]["metrics"]


def changed(config: Config) -> str:
    """What is said where a run's measures are not those that its stages left."""
    again = f"delete it, and the same command measures {config.run} again"
    return f"{config.run / 'eval'} was changed by other commands: {again}"


def measures_of(config: Config) -> dict[str, float | None]:
    """The measures of a finished run at its last step, with its own evaluation settings."""
    metrics, align = last_metrics(config), read_alignment(config.run / "eval")
    here = {"step": config.train.steps, "timesteps": [SHOWN_TIMESTEP], "seed": config.eval.seed}
    here["num_images"] = min(NUM_IMAGES, align["num_available"])
    if any(align.get(key) != value for key, value in here.items()):
        raise UserError(changed(config))
    of_images = (name for name in metrics if not name.startswith(CLIP))
    accuracy = next((name for name in of_images if kind_of(name) == "accuracy"), None)  # a classifier's alone
    values = (
        metrics[headline(metrics)]["value"],
        None if accuracy is None else metrics[accuracy]["value"],
        align["heldout_loss_diff"],
        *(value_of(align, metric) for metric in ("cknna", "cca")),
        value_of(align, "cosine", features="head"),
    )
    of_clips = {name: found["value"] for name, found in clip_metrics(metrics).items()}
    return dict(zip(MEASURES, values, strict=True)) | of_clips


def clip_metrics(metrics: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """Those of a point's metrics that are of whole clips, by the names that they have in the table."""
    kinds = {kind_of(name): found for name, found in metrics.items() if name.startswith(CLIP)}
    return {measure: kinds[kind] for measure, (kind, _) in OF_CLIPS.items() if kind in kinds}


def measures_of_table(table: Mapping[str, Mapping]) -> dict[str, str]:
    """The measures of the columns of a table of arms, with their formats."""
    measured = {name for rows in table.values() for name in rows}
    return MEASURES | {name: form for name, (_, form) in OF_CLIPS.items() if name in measured}


def conditions_of(config: Config) -> dict[str, dict]:
    """For each measure the settings that decide whether it can be compared."""
    flat = flat_settings(config)
    return {
        measure: {key: flat[key] for key in flat if any(f"{key}.".startswith(f"{k}.") for k in keys)}
        for measure, keys in CONDITIONS.items()
    }


def write_results(
    args: argparse.Namespace, results: dict, reference: str, incomparable: dict, config: Config
) -> None:
    """Write table.md, results.json and arms.png, and print the table. `config` is that of a run of the reference arm."""
    table = summarise(results, reference, incomparable)
    measures = measures_of_table(table)
    text = markdown(table, measures, DIFFERENCES)
    drawn, sampler = config.eval, family_for(config).sampler_of(config.eval.sampler)
    note = (
        f"Mean ± standard error over {len(args.seeds)} seeds ({', '.join(map(str, args.seeds))}) at step "
        f"{config.train.steps:,}; differences from {reference}, seed by seed. Fréchet distance and accuracy by "
        f"{Path(drawn.extractor).name} on {drawn.num_samples:,} samples ({sampler} {drawn.sampling_steps} steps, guidance "
        f"{drawn.cfg:g}); CKNNA and CCA of the main tap with the teacher at timestep {SHOWN_TIMESTEP}, held-out images."
    )
    real = {name: found["real"] for name, found in clip_metrics(last_metrics(config)).items()}
    if found := [f"{name} {value:{measures[name]}}" for name, value in real.items() if value is not None]:
        note += f" Real clips have {', '.join(found)}."
    if any(incomparable.values()):
        note += f" †: measured under other settings than {reference}'s, not comparable with it."
    below = f"{plain_text.markdown(note)}\n\n{plain_text.code(this_command())}"
    write_atomically(args.out / "table.md", f"{text}\n\n{below}\n".encode())
    content = {"command": this_command(), "note": note, "reference": reference}
    content["not_comparable"] = {arm: sorted(measures) for arm, measures in incomparable.items() if measures}
    write_json(args.out / "results.json", content | {"results": results, "summary": table})
    caption = f"{len(args.seeds)} seeds (dots), mean ± standard error; dashed: {reference}"
    figure, names = args.out / "arms.png", {name: name for name in PLOTTED}
    plot_arms(figure, results, reference, names, caption, incomparable)
    print(f"{text}\n\n{note}\n{figure}")


if __name__ == "__main__":
    run_script(main)
