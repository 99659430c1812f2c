"""The whole pipeline on the embedded miniature: the real scripts, one after the other, and a page of results.

    make demo            # or: python demo.py

Each stage is a command that can be pasted. A second call runs only what is missing; one that was killed goes on where it
stopped. To start over, delete data/demo and runs/demo.
"""

import argparse
import hashlib
import os
from pathlib import Path

from common.errors import run_script
from common.stages import ROOT, Record, Stage, last_line, log_of, run_chains

DATA, RUNS = Path("data/demo"), Path("runs/demo")
LOGS, RECORD, PAGE = RUNS / "logs", RUNS / "stages.json", RUNS / "index.html"
CONFIG = Path("configs/demo.yaml")
BASE, TEACHER = DATA / "models/sd15-mini", DATA / "models/dinov2-mini"
SPLITS = {"train": ("cache", 139), "val": ("cache_val", 35)}
ARMS = {"urepa": "", "baseline": f" align.coeff=0 run={RUNS}/baseline"}


def stages() -> list[list[Stage]]:
    """The groups of stages in order."""
    pre = "preprocessing"
    return [
        [
            Stage(
                "digits and small models", f"{pre}/0_make_demo.py --out {DATA}", DATA / "models/quality.json"
            )
        ],
        [
            Stage(
                f"sample {split}",
                f"{pre}/1_sample_imagenet_subset.py --imagenet {DATA}/ILSVRC --split {split} --per-class {count} "
                f"--out {DATA}/{split}.csv",
                DATA / f"{split}.csv",
            )
            for split, (_, count) in SPLITS.items()
        ],
        [
            Stage(
                f"latents {split}",
                f"{pre}/2_encode_vae_latents.py --csv {DATA}/{split}.csv --base {BASE} --image-size 32 --workers 0 "
                f"--out {DATA}/{cache}/latents",
                DATA / cache / "latents/manifest.json",
            )
            for split, (cache, _) in SPLITS.items()
        ],
        [
            Stage(
                f"tokens {split}",
                f"{pre}/3_build_dino_cache.py --csv {DATA}/{split}.csv --teacher {TEACHER} --grid 4 --workers 0 "
                f"--out {DATA}/{cache}/tokens",
                DATA / cache / "tokens/manifest.json",
            )
            for split, (cache, _) in SPLITS.items()
        ],
        [
            Stage(
                "text",
                f"{pre}/4_prepare_clip_embeddings.py --class-names {DATA}/imagenet_classes.json --base {BASE} "
                f"--out {DATA}/cache/text",
                DATA / "cache/text/manifest.json",
            )
        ],
        [
            Stage(
                f"verify {split}",
                f"{pre}/5_verify_cache.py --csv {DATA}/{split}.csv --latents {DATA}/{cache}/latents "
                f"--tokens {DATA}/{cache}/tokens --text {DATA}/cache/text --full --sheet {DATA}/{cache}/sheet.png",
                DATA / cache / "sheet.png",
            )
            for split, (cache, _) in SPLITS.items()
        ],
        [
            Stage(f"train {arm}", f"train_sd15.py --config {CONFIG}{override}", RUNS / arm / "export")
            for arm, override in ARMS.items()
        ],
        [
            Stage(
                "curve",
                f"evaluate_sd15.py curve {' '.join(f'{RUNS}/{arm}' for arm in ARMS)} {CONFIG} --out {RUNS}/curve",
                RUNS / "curve/curve.json",
            )
        ],
        [
            # The plan's 250 steps would take minutes here.
            Stage(
                f"final {arm}",
                f"evaluate_sd15.py final {RUNS}/{arm} eval.sampling_steps=12 --sweep 1 1.5 3",
                RUNS / arm / "eval/points.jsonl",
            )
            for arm in ARMS
        ],
        [
            Stage(f"align {arm}", f"evaluate_sd15.py align {RUNS}/{arm}", RUNS / arm / "eval/align.json")
            for arm in ARMS
        ],
        [
            Stage(
                "page",
                f"evaluate_sd15.py report {' '.join(f'{RUNS}/{arm}' for arm in ARMS)} {CONFIG} -o {PAGE} --times {RECORD}",
                PAGE,
            )
        ],
    ]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    os.chdir(ROOT)
    config = hashlib.sha256(CONFIG.read_bytes()).hexdigest()
    record = Record(RECORD)
    for number, group in enumerate(stages()):
        missing = [stage for stage in group if not is_done(stage, record, config)]
        for stage in group:
            print(f"{'· ' if stage in missing else '✓ '}{stage.name:24} {stage.pasted}", flush=True)
        if missing:
            # The page shows what came before it, so it is drawn again.
            PAGE.unlink(missing_ok=True)
            run_group(missing, lambda stage, seconds: record.add(stage, seconds, group=number, config=config))  # noqa: B023
    longest: dict[int, float] = {}  # of a group's stages, which ran side by side
    for entry in record.entries.values():
        longest[entry["group"]] = max(longest.get(entry["group"], 0), entry["seconds"])
    minutes = sum(longest.values()) / 60
    print(f"{minutes:.1f} minutes of running in all; the results are in {(RUNS / 'index.html').resolve()}")


def is_done(stage: Stage, record: Record, config: str) -> bool:
    """Whether a stage ran to its end with the present demo.yaml."""
    entry = record.of(stage)
    changed = entry is not None and str(CONFIG) in stage.command and entry["config"] != config
    return entry is not None and not changed


def run_group(group: list[Stage], ended) -> None:
    """Run stages side by side, and print the last line of each log."""
    if len(group) > 1:
        print(f"  side by side; their output goes to {LOGS}", flush=True)
    run_chains([[stage] for stage in group], jobs=len(group), logs=LOGS, ended=ended)
    if len(group) > 1:
        for stage in group:
            print(f"  {stage.name}: {last_line(log_of(stage, LOGS), width=200)}")


if __name__ == "__main__":
    run_script(main)
