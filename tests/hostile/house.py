"""A small house of everything that a user has, made by the real commands: data, models, caches, a run and its results.

data/ILSVRC data/models data/imagenet_classes.json    the smallest demo (script 0)
data/train.csv data/val.csv cache/ cache_val/         scripts 1 to 4
a.yaml runs/a                                         a training of six steps, evaluated and exported
lora.yaml runs/lora                                   one of two steps with LoRA
images/ real.classifier.npz                           pictures of one's own, and a reference of the training images
"""

import shutil
from pathlib import Path

import yaml
from hostile import run

SETTINGS = """\
run: runs/a
model: {base: data/models/sd15-mini, train: full}
teacher: {dim: 64, grid: 4}
data:
  csv: data/train.csv
  latents: cache/latents
  tokens: cache/tokens
  text: cache/text
  batch_size: 4
align: {coeff: 0.8, manifold_coeff: 3.0}
optim: {lr: 0.0001, warmup_fraction: 0.0}
train: {steps: 6, log_every: 2, checkpoint_every: 2, keep_checkpoints: 3}
eval:
  csv: data/val.csv
  latents: cache_val/latents
  tokens: cache_val/tokens
  extractor: data/models/classifier
  num_samples: 20
  sampling_steps: 2
  bootstrap: 5
"""
MAKE = """\
0 --out data --quick
1 --imagenet data/ILSVRC --split train --per-class 6 --out data/train.csv
1 --imagenet data/ILSVRC --split val --per-class 6 --out data/val.csv
2 --csv data/train.csv --base data/models/sd15-mini --image-size 32 --workers 0 --batch-size 16 --out cache/latents
2 --csv data/val.csv --base data/models/sd15-mini --image-size 32 --workers 0 --batch-size 16 --out cache_val/latents
3 --csv data/train.csv --teacher data/models/dinov2-mini --grid 4 --workers 0 --batch-size 16 --out cache/tokens
3 --csv data/val.csv --teacher data/models/dinov2-mini --grid 4 --workers 0 --batch-size 16 --out cache_val/tokens
4 --class-names data/imagenet_classes.json --base data/models/sd15-mini --out cache/text
train --config a.yaml
train --config lora.yaml
evaluate metrics runs/a
evaluate align runs/a --num-images 40 --timesteps 200
evaluate reference data/train.csv --size 32 --out real eval.extractor=data/models/classifier
"""


def build(folder: Path) -> Path:
    """Make the house in an empty folder."""
    (folder / "a.yaml").write_text(SETTINGS)
    lora = {"train": "lora", "lora_rank": 4, "lora_alpha": 4}
    settings = yaml.safe_load(SETTINGS) | {"run": "runs/lora"}
    settings["model"] |= lora
    settings["train"]["steps"] = 2
    (folder / "lora.yaml").write_text(yaml.safe_dump(settings))
    for command in MAKE.splitlines():
        outcome = run(command, folder, patience=120)
        assert outcome.code == 0, f"{command}\n{outcome.err}{outcome.out}"
    drawn = min((folder / "runs/a/samples").iterdir())
    shutil.copytree(drawn, folder / "images", ignore=shutil.ignore_patterns("*.json*"))
    return folder
