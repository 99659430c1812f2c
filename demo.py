"""The whole pipeline on the embedded miniature: the real scripts, one after the other, and a page of results.

    make demo            # or: python demo.py

Each stage is a command that can be pasted. A second call runs only what is missing; one that was killed goes on where it
stopped. To start over, delete data/demo and runs/demo.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, run_script
from files import write_json

DATA, RUNS = Path("data/demo"), Path("runs/demo")
LOGS, RECORD = RUNS / "logs", RUNS / "stages.json"
BASE, TEACHER = DATA / "models/sd15-mini", DATA / "models/dinov2-mini"
SPLITS = {"train": ("cache", 139), "val": ("cache_val", 35)}
ARMS = {"urepa": "", "baseline": f" align.coeff=0 run={RUNS}/baseline"}


@dataclass(frozen=True)
class Stage:
    """A command and the file that it writes last; stages of one group run side by side."""

    name: str
    command: str
    product: Path


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
            Stage(
                f"train {arm}", f"train_sd15.py --config configs/demo.yaml{override}", RUNS / arm / "export"
            )
            for arm, override in ARMS.items()
        ],
        [
            Stage(f"fid {arm}", f"evaluate_sd15.py fid {RUNS}/{arm} --checkpoint all", RUNS / arm / "eval")
            for arm in ARMS
        ],
        [
            Stage(f"align {arm}", f"evaluate_sd15.py align {RUNS}/{arm}", RUNS / arm / "eval/align.json")
            for arm in ARMS
        ],
        [
            Stage(
                "page",
                f"evaluate_sd15.py compare {' '.join(f'{RUNS}/{arm}' for arm in ARMS)} --out {RUNS} --times {RECORD}",
                RUNS / "index.html",
            )
        ],
    ]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    os.chdir(Path(__file__).resolve().parent)
    LOGS.mkdir(parents=True, exist_ok=True)
    config = hashlib.sha256(Path("configs/demo.yaml").read_bytes()).hexdigest()
    record = {entry["command"]: entry for entry in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    for number, group in enumerate(stages()):
        missing = [stage for stage in group if not is_done(stage, record, config)]
        for stage in group:
            print(f"{'· ' if stage in missing else '✓ '}{stage.name:24} {pasted(stage)}", flush=True)
        if missing:
            # The page shows what came before it, so it is drawn again.
            (RUNS / "index.html").unlink(missing_ok=True)
            for stage, seconds in run_group(missing).items():
                entry = {"stage": stage.name, "command": pasted(stage), "seconds": round(seconds, 1)}
                record[pasted(stage)] = entry | {"group": number, "config": config}
            write_json(RECORD, list(record.values()))
    longest: dict[int, float] = {}  # of a group's stages, which ran side by side
    for entry in record.values():
        longest[entry["group"]] = max(longest.get(entry["group"], 0), entry["seconds"])
    minutes = sum(longest.values()) / 60
    print(f"{minutes:.1f} minutes of running in all; the results are in {(RUNS / 'index.html').resolve()}")


def is_done(stage: Stage, record: dict[str, dict], config: str) -> bool:
    """Whether a stage ran to its end as it would run now: a changed demo.yaml is noticed, and the training says so."""
    entry = record.get(pasted(stage))
    changed = entry is not None and "configs/demo.yaml" in stage.command and entry["config"] != config
    return entry is not None and not changed and stage.product.exists()


def run_group(group: list[Stage]) -> dict[Stage, float]:
    """Run stages side by side, one thread each; returns the seconds that each took."""
    started = time.monotonic()
    beside = len(group) > 1
    live = beside and sys.stderr.isatty()
    if beside:
        print(f"  side by side; what they say goes to {LOGS}", flush=True)
    running = {stage: start(stage, shown=not beside) for stage in group}
    seconds: dict[Stage, float] = {}
    try:
        while running:
            time.sleep(0.2)
            if live:
                print(
                    "\r\x1b[K  " + "   ".join(last_line(stage) for stage in running), end="", file=sys.stderr
                )
            for stage in [stage for stage, process in running.items() if process.poll() is not None]:
                seconds[stage] = time.monotonic() - started
                if running.pop(stage).returncode:
                    fail(stage, shown=not beside)
    except KeyboardInterrupt:  # Ctrl-C reached the stages too: let them save what they have
        for process in running.values():
            process.wait(timeout=60)
        raise
    finally:
        for process in running.values():
            process.terminate()
        if live:
            print("\r\x1b[K", end="", file=sys.stderr)
    if beside:
        for stage in group:
            print(f"  {stage.name}: {last_line(stage, width=200)}")
    return seconds


def start(stage: Stage, *, shown: bool) -> subprocess.Popen:
    """Start a stage; its output goes to the terminal, or to its log when another one runs beside it."""
    output = None if shown else open(log_of(stage), "w")  # noqa: SIM115 (the child keeps it)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # two busy threads on a shared core are slower than one
    return subprocess.Popen(
        [sys.executable, *shlex.split(stage.command)], stdout=output, stderr=output, env=environment,
        preexec_fn=die_with_parent,
    )  # fmt: skip


def die_with_parent() -> None:
    """On Linux: a child does not outlive a demo that was killed, and so cannot collide with the next one."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def fail(stage: Stage, *, shown: bool) -> None:
    if not shown:
        print("\n" + log_of(stage).read_text()[-3000:], file=sys.stderr)
    raise UserError(f"stage '{stage.name}' failed; once that is mended, the same command goes on from here")


def pasted(stage: Stage) -> str:
    return f"python {stage.command}"


def log_of(stage: Stage) -> Path:
    return LOGS / f"{stage.name.replace(' ', '_')}.log"


def last_line(stage: Stage, width: int = 60) -> str:
    """The last thing a stage said, be it a progress bar."""
    said = [line for line in log_of(stage).read_text().replace("\r", "\n").split("\n") if line.strip()]
    return said[-1].strip()[:width] if said else f"{stage.name} …"


if __name__ == "__main__":
    run_script(main)
