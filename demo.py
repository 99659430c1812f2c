"""The whole pipeline on the embedded miniature: the real scripts, one after the other, and a page of results.

    make demo            # or: python demo.py

Each stage is a command that can be pasted. A second call runs only what is missing; one that was killed goes on where it
stopped. To start over, delete data/demo and runs/demo.
"""

import hashlib
import os
from pathlib import Path

from common.arguments import Parser
from common.errors import run_script
from common.stages import ROOT, Record, Stage, last_line, log_of, run_chains

DATA, RUNS = Path("data/demo"), Path("runs/demo")
LOGS, RECORD, PAGE = RUNS / "logs", RUNS / "stages.json", RUNS / "index.html"
CONFIG = Path("configs/demo.yaml")
SPLITS = [
    {"split": "train", "cache": "cache", "count": 139},
    {"split": "val", "cache": "cache_val", "count": 35},
]
ARMS = [
    {"arm": "urepa", "override": ""},
    {"arm": "baseline", "override": f" align.coeff=0 run={RUNS}/baseline"},
]
NAMES = {
    "data": DATA, "runs": RUNS, "page": PAGE, "record": RECORD, "config": CONFIG,
    "base": DATA / "models/sd15-mini", "teacher": DATA / "models/dinov2-mini",
    "arms": f"{RUNS}/urepa {RUNS}/baseline",
}  # fmt: skip
# The groups of stages in order: each stage's name, its command, and the file that it writes last. The stages of a group, one
# for each split or arm, run side by side.
GROUPS = [
    ("digits and small models", "preprocessing/0_make_demo.py --out {data}", "{data}/models/quality.json"),
    ("sample {split}",
     "preprocessing/1_sample_imagenet_subset.py --imagenet {data}/ILSVRC --split {split} --per-class {count} "
     "--out {data}/{split}.csv",
     "{data}/{split}.csv"),
    ("latents {split}",
     "preprocessing/2_encode_vae_latents.py --csv {data}/{split}.csv --base {base} --image-size 32 --workers 0 "
     "--out {data}/{cache}/latents",
     "{data}/{cache}/latents/manifest.json"),
    ("tokens {split}",
     "preprocessing/3_build_dino_cache.py --csv {data}/{split}.csv --teacher {teacher} --grid 4 --workers 0 "
     "--out {data}/{cache}/tokens",
     "{data}/{cache}/tokens/manifest.json"),
    ("text",
     "preprocessing/4_prepare_text_embeddings.py --class-names {data}/imagenet_classes.json --base {base} "
     "--out {data}/cache/text",
     "{data}/cache/text/manifest.json"),
    ("verify {split}",
     "preprocessing/5_verify_cache.py --csv {data}/{split}.csv --latents {data}/{cache}/latents --tokens {data}/{cache}/tokens "
     "--text {data}/cache/text --full --sheet {data}/{cache}/sheet.png",
     "{data}/{cache}/sheet.png"),
    ("train {arm}", "train.py --config {config}{override}", "{runs}/{arm}/export"),
    ("curve", "evaluate.py curve {arms} {config} --out {runs}/curve", "{runs}/curve/curve.json"),
    # The plan's 250 steps would take minutes here.
    ("final {arm}",
     "evaluate.py final {runs}/{arm} eval.sampling_steps=12 --sweep 1 1.5 3",
     "{runs}/{arm}/eval/points.jsonl"),
    ("align {arm}", "evaluate.py align {runs}/{arm}", "{runs}/{arm}/eval/align.json"),
    ("page", "evaluate.py report {arms} {config} -o {page} --times {record}", "{page}"),
]  # fmt: skip


def stages() -> list[list[Stage]]:
    """The groups of stages in order."""
    groups = []
    for name, command, product in GROUPS:
        variants = SPLITS if "{split}" in name else ARMS if "{arm}" in name else [{}]
        filled = [[text.format(**NAMES, **v) for text in (name, command, product)] for v in variants]
        groups.append([Stage(name, command, Path(product)) for name, command, product in filled])
    return groups


def main(argv: list[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)
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
    print(f"{minutes:.1f} minutes of running in all; the results are in {PAGE.resolve()}")


def is_done(stage: Stage, record: Record, config: str) -> bool:
    """Whether a stage ran to its end with the present demo.yaml."""
    entry = record.of(stage)
    return entry is not None and (str(CONFIG) not in stage.command or entry["config"] == config)


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
