"""The whole pipeline on the embedded miniature: the real scripts, one after the other, and a page of results.

    make demo                                  # or: python demo.py
    python demo.py --moving                    # films of moving digits, with CREPA and without: ten minutes
    python demo.py --family sdxl --quick       # the same stages on a tiny pipeline of another family

With --family the network is that family's own, with random weights: its images are noise, and the page shows that every stage
works. Each stage is a command that can be pasted. A second call runs only what is missing; one that was killed goes on where it
stopped. To start over, delete data/demo and runs/demo (data/moving and runs/demo_moving; data/demo_NAME and runs/demo_NAME).
"""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.arguments import Parser
from common.errors import run_script
from common.stages import ROOT, Record, Stage, last_line, log_of, run_chains, wall_seconds

SPLITS = [
    {"split": "train", "cache": "cache", "count": 139},
    {"split": "val", "cache": "cache_val", "count": 35},
]
ARMS = [{"arm": "urepa", "without": ""}, {"arm": "baseline", "without": " align.coeff=0"}]
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
    ("train {arm}", "train.py --config {config}{without} run={runs}/{arm}", "{runs}/{arm}/export"),
    ("curve", "evaluate.py curve {arms} {config} --out {runs}/curve", "{runs}/curve/curve.json"),
    # The plan's 250 steps would take minutes here.
    ("final {arm}",
     "evaluate.py final {runs}/{arm} eval.sampling_steps=12 --sweep 1 1.5 3",
     "{runs}/{arm}/eval/points.jsonl"),
    ("align {arm}", "evaluate.py align {runs}/{arm}", "{runs}/{arm}/eval/align.json"),
    ("page", "evaluate.py report {arms} {config} -o {page} --times {record}", "{page}"),
]  # fmt: skip

QUICK_ARMS = [ARMS[0] | {"arm": "aligned"}, ARMS[1]]
NOTE = (
    "All weights are random, of the tiny network, its VAE and its text encoders, and so images are noise: this page shows that "
    "every stage works, and says nothing about alignment."
)
QUICK_SPLITS = [SPLITS[0] | {"count": 6}, SPLITS[1] | {"count": 3}]
QUICK_GROUPS = [
    ("digits and small models", "preprocessing/0_make_demo.py --out {data} --quick --family {family}",
     "{data}/models/quality.json"),
    GROUPS[1],
    ("latents and tokens {split}",
     "preprocessing/2_encode_vae_latents.py --csv {data}/{split}.csv --base {base} --image-size 64 --workers 0 "
     "--out {data}/{cache}/latents --fused {data}/{cache}/tokens --teacher {teacher} --grid 4",
     "{data}/{cache}/tokens/manifest.json"),
    GROUPS[4],
    # The VAE has random weights, so its pictures are not compared with the images.
    ("verify {split}",
     "preprocessing/5_verify_cache.py --csv {data}/{split}.csv --latents {data}/{cache}/latents --tokens {data}/{cache}/tokens "
     "--text {data}/cache/text --full",
     "{data}/{cache}/tokens/manifest.json"),
    ("train {arm}",
     "train.py --config configs/families/{family}.yaml --config {config} model.base={base} {caches}{without} run={runs}/{arm}",
     "{runs}/{arm}/export"),
    ("final",
     "evaluate.py final {arms} eval.num_samples=20 eval.sampling_steps=3 --sweep 1.5",
     "{runs}/baseline/eval/points.jsonl"),
    ("align", "evaluate.py align {arms} --timesteps 500 --num-images 20", "{runs}/baseline/eval/align.json"),
    ("page", "evaluate.py report {arms} -o {page} --times {record} --note '{note}'", "{page}"),
]  # fmt: skip
# Of a family of videos.
CLIP_GROUPS = [
    QUICK_GROUPS[0],
    ("list clips",
     "preprocessing/1_sample_imagenet_subset.py --videos {data}/clips --frames 9 --fps 8 --windows 2 --hold-out 8 "
     "--hold-out-csv {data}/val.csv --out {data}/train.csv",
     "{data}/val.csv"),
    QUICK_GROUPS[2],
    ("text",
     "preprocessing/4_prepare_text_embeddings.py --csv {data}/train.csv {data}/val.csv --base {base} --out {data}/cache/text",
     "{data}/cache/text/manifest.json"),
    *QUICK_GROUPS[4:6],
    ("final",
     "evaluate.py final {arms} eval.num_samples=4 eval.sampling_steps=2 --sweep",
     "{runs}/baseline/eval/points.jsonl"),
    ("align", "evaluate.py align {arms} --timesteps 500 --num-images 16", "{runs}/baseline/eval/align.json"),
    QUICK_GROUPS[-1],
]  # fmt: skip
MOVING_ARMS = [{"arm": "crepa", "without": " align.neighbours=1"}, ARMS[1]]
# Of the trained miniature of clips.
MOVING_GROUPS = [
    ("moving digits and small models", "preprocessing/0_make_demo.py --out {data} --moving", "{data}/models/quality.json"),
    ("list {split}",
     "preprocessing/1_sample_imagenet_subset.py --videos {data}/clips/{split} --frames 13 --fps 8 --out {data}/{split}.csv",
     "{data}/{split}.csv"),
    ("latents and tokens {split}",
     "preprocessing/2_encode_vae_latents.py --csv {data}/{split}.csv --base {base} --image-size 32 --workers 0 --batch-size 32 "
     "--out {data}/{cache}/latents --fused {data}/{cache}/tokens --teacher {teacher} --grid 4",
     "{data}/{cache}/tokens/manifest.json"),
    ("text",
     "preprocessing/4_prepare_text_embeddings.py --csv {data}/train.csv {data}/val.csv --base {base} --out {data}/cache/text",
     "{data}/cache/text/manifest.json"),
    GROUPS[5],
    GROUPS[6],
    ("metrics", "evaluate.py metrics {arms}", "{runs}/baseline/eval/points.jsonl"),
    ("align", "evaluate.py align {arms}", "{runs}/baseline/eval/align.json"),
    ("page", "evaluate.py report {arms} -o {page} --times {record}", "{page}"),
]  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """The folders and the stages of one demo: of a trained miniature, of images or clips, or of a family's tiny pipeline."""

    family: str | None
    clips: bool = False  # whether it is one of videos

    @property
    def data(self) -> Path:
        if self.family is None:
            return Path("data/moving" if self.clips else "data/demo")
        return Path(f"data/demo_{self.family}")

    @property
    def runs(self) -> Path:
        return Path("runs") / ("demo_moving" if self.data.name == "moving" else self.data.name)

    @property
    def config(self) -> Path:
        if self.family is None:
            return Path("configs/study/moving/base.yaml" if self.clips else "configs/demo.yaml")
        return Path("configs/demo_quick.yaml")

    @property
    def logs(self) -> Path:
        return self.runs / "logs"

    @property
    def record(self) -> Path:
        return self.runs / "stages.json"

    @property
    def page(self) -> Path:
        return self.runs / "index.html"

    @property
    def arms(self) -> list[dict]:
        trained = MOVING_ARMS if self.clips else ARMS
        return trained if self.family is None else QUICK_ARMS

    @property
    def names(self) -> dict[str, object]:
        """What the commands of the stages are filled with."""
        data, name = self.data, self.family or ("ltx" if self.clips else "sd15")
        kind = "moving" if self.family is None and self.clips else "mini"
        fields = {"data.csv": "train.csv", "eval.csv": "val.csv", "data.text": "cache/text"}
        for section, cache in (("data", "cache"), ("eval", "cache_val")):
            fields |= {f"{section}.{field}": f"{cache}/{field}" for field in ("latents", "tokens")}
        fields["eval.extractor"] = "models/classifier"
        return {
            "data": data, "runs": self.runs, "page": self.page, "record": self.record, "config": self.config,
            "family": self.family, "base": data / f"models/{name}-{kind}",
            "teacher": data / f"models/dinov2-{kind}", "note": NOTE,
            "arms": " ".join(f"{self.runs}/{arm['arm']}" for arm in self.arms),
            "caches": " ".join(f"{key}={data / path}" for key, path in fields.items()),
        }  # fmt: skip

    def stages(self) -> list[list[Stage]]:
        """The groups of stages in order."""
        if self.family is None:
            groups, splits = MOVING_GROUPS if self.clips else GROUPS, SPLITS
        else:
            groups, splits = CLIP_GROUPS if self.clips else QUICK_GROUPS, QUICK_SPLITS
        found = []
        for name, command, product in groups:
            variants = splits if "{split}" in name else self.arms if "{arm}" in name else [{}]
            filled = [[text.format(**self.names, **v) for text in (name, command, product)] for v in variants]
            found.append([Stage(name, command, Path(product)) for name, command, product in filled])
        return found


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--family", metavar="NAME", help="a tiny pipeline of this family, with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="random weights and ten steps: minutes become seconds"
    )
    parser.add_argument("--moving", action="store_true", help="the trained miniature of clips")
    args = parser.parse_args(argv)
    if (args.family is None) == args.quick or (args.moving and args.quick):
        parser.error(
            "--family NAME and --quick go together; without both, a trained miniature is shown: of SD-1.5, or with --moving"
        )
    clips = args.moving
    if args.family is not None:
        from models.families.table import family_named

        clips = family_named(args.family).method == "CREPA"
    os.chdir(ROOT)
    demo = Demo(args.family, clips)
    config = hashlib.sha256(demo.config.read_bytes()).hexdigest()
    record = Record(demo.record)
    for number, group in enumerate(demo.stages()):
        missing = [stage for stage in group if not is_done(demo, stage, record, config)]
        for stage in group:
            print(f"{'· ' if stage in missing else '✓ '}{stage.name:24} {stage.pasted}", flush=True)
        if missing:
            # The page shows what came before it, so it is drawn again.
            demo.page.unlink(missing_ok=True)
            recorded = partial(record.add, group=number, config=config)
            run_group(demo, missing, recorded)
    minutes = wall_seconds(record.entries.values()) / 60
    print(f"{minutes:.1f} minutes of running in all; the results are in {demo.page.resolve()}")


def is_done(demo: Demo, stage: Stage, record: Record, config: str) -> bool:
    """Whether a stage ran to its end with the present config of the demo."""
    entry = record.of(stage)
    return entry is not None and (str(demo.config) not in stage.command or entry["config"] == config)


def run_group(demo: Demo, group: list[Stage], ended) -> None:
    """Run stages side by side, and print the last line of each log."""
    if len(group) > 1:
        print(f"  side by side; their output goes to {demo.logs}", flush=True)
    run_chains([[stage] for stage in group], jobs=len(group), logs=demo.logs, ended=ended)
    if len(group) > 1:
        for stage in group:
            print(f"  {stage.name}: {last_line(log_of(stage, demo.logs), width=200)}")


if __name__ == "__main__":
    run_script(main)
