"""Write a run's weights as other tools read them: diffusers, ComfyUI, AUTOMATIC1111.

    python export.py runs/A                         # what a training writes at its end: EMA and raw, with a model card
    python export.py runs/A --checkpoint 30000 --out A_30k
    python export.py runs/A --kohya                 # LoRA under kohya's names, for ComfyUI and AUTOMATIC1111
    python export.py runs/A --pipeline              # a whole pipeline folder with the EMA weights in it

LoRA becomes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)` (of PixArt, whose pipeline has no such
function, a folder for `PeftModel.from_pretrained`), anything else a diffusers folder of the
network, such as `unet/`.
Heads are never exported.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator
from safetensors.torch import save_file

from common.arguments import Parser, between
from common.errors import UserError, run_script
from common.files import locked, write_json, written_whole
from common.plain_text import code, code_block, markdown, printable, quoted
from common.pretrained import load_pretrained
from common.reading import JsonRecord, read_record
from configs.loading import resolved_yaml
from method.paths import SCHEDULER_TYPES
from models.aligned import AlignedModel
from models.backbone import Backbone
from report.records import points_file
from training.checkpoint import EMA, WEIGHTS, Fingerprint, checkpoints, load_weights, state_of, step_of
from training.meter import RATES
from training.parts import build_model, family_for, load_network
from training.run_folder import POINTS, RunFolder

MADE_FROM, UNFINISHED = "made_from.json", "unfinished"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--checkpoint", type=between(0, 10**9), metavar="STEP", help="default: the newest")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/export, or RUN/export-STEP)")
    parser.add_argument("--kohya", action="store_true", help="add LoRA files under kohya's names")
    parser.add_argument("--pipeline", action="store_true", help="add a pipeline folder with the EMA weights")
    args = parser.parse_args(argv)
    run = RunFolder(args.run)
    if args.kohya and run.config.model.train != "lora":
        raise UserError(f"{args.run} trained model.train={run.config.model.train}: --kohya is for LoRA")
    if args.pipeline and run.config.model.quantize != "none":
        raise UserError(
            f"{args.run} trained on weights in {run.config.model.quantize}, and LoRA is not merged into these: leave "
            "--pipeline out, the exported LoRA loads into any pipeline of the base model"
        )
    if args.kohya and family_for(run.config).kohya_base is None:
        raise UserError(f"kohya's tools have no name for {family_for(run.config).name}: leave --kohya out")
    checkpoint = checkpoint_of(run, args.checkpoint)
    out, own = args.out, args.out is None
    if own:
        out = run.path / ("export" if args.checkpoint is None else f"export-{args.checkpoint}")
    export_checkpoint(run, checkpoint, out, replace=own)
    if args.kohya:
        write_once(out / "kohya", checkpoint, lambda aside: export_kohya(run, checkpoint, aside))
    if args.pipeline:
        write_once(out / "pipeline", checkpoint, lambda aside: export_pipeline(run, checkpoint, aside))


def checkpoint_of(run: RunFolder, step: int | None) -> Path:
    found = {step_of(path): path for path in checkpoints(run.checkpoint_folder)}
    if not found:
        raise UserError(f"{run.path} has no checkpoint yet")
    if step is not None and step not in found:
        raise UserError(f"{run.path} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def export_run(run: RunFolder) -> None:
    """Write the raw and EMA weights of a finished run, unless they are there, and say how to load them."""
    export_checkpoint(run, checkpoint_of(run, None), run.path / "export")
    print(f"{run.path} is complete")


def export_checkpoint(run: RunFolder, checkpoint: Path, folder: Path, *, replace: bool = True) -> None:
    def write(aside: Path) -> None:
        model = run_model(run, torch.bfloat16)  # of LoRA, the frozen weights are not written
        for kind, file in WEIGHTS.items():
            load_weights(checkpoint / file, model.trained_parameters())
            model.export(aside / kind)
        (aside / "README.md").write_text(model_card(run, step_of(checkpoint)), encoding="utf-8")

    write_once(folder, checkpoint, write, replace=replace)
    for also in (folder / "kohya", folder / "pipeline"):
        note = also / MADE_FROM
        if note.exists() and (of := read_made_from(note)["checkpoint"]) != checkpoint.name:
            print(f"{also} is still that of {of}: --{also.name} makes it anew")
    family = family_for(run.config)
    part, lora = family.part, load_lora(family, f"{folder}/ema")
    how = lora if run.config.model.train == "lora" else f"{part} folder {folder}/ema/{part}"
    print(f"EMA weights for diffusers: {how}")


def run_model(run: RunFolder, dtype: torch.dtype = torch.float32) -> AlignedModel:
    """The run's model with its weights as they were before the training; frozen weights in `dtype`, and not quantised."""
    config, family = run.config, family_for(run.config)
    network = load_network(
        config.model.model_copy(update={"quantize": "none"}), family, dtype, torch.device("cpu")
    )
    return build_model(config.model, config.align, config.teacher, config.seed, family, network)


def _inside(name: str) -> str:
    """A path below the folder: what an edited file names elsewhere is never removed."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("it leaves the folder")
    return name


class MadeFrom(JsonRecord):
    """made_from.json: the checkpoint of an export, and the files that the export wrote, {path in the folder: bytes}."""

    checkpoint: str
    files: dict[str, Fingerprint]
    written: dict[Annotated[str, AfterValidator(_inside)], int]


def write_once(
    folder: Path, checkpoint: Path, write: Callable[[Path], None], *, replace: bool = True
) -> None:
    """Let `write` fill a folder from a checkpoint; of two processes that do so at once, one waits.

    One that was made of the same checkpoint and is whole is left alone. In one of another checkpoint, such as an earlier one of
    a run that went on, what that export wrote is replaced and everything else stays; without `replace` it is refused by
    `UserError`.
    """
    source = {"checkpoint": checkpoint.name, "files": state_of(checkpoint)["files"]}
    place = Path(os.path.realpath(folder))  # a link is followed
    note, new = place / MADE_FROM, place.with_name(f".{place.name}.new")
    with locked(place):
        before = read_made_from(note) if os.path.lexists(note) else {"written": {}}
        ours = before == source | {"written": before["written"]}
        if ours and all(size_of(place / name) == size for name, size in before["written"].items()):
            print(f"{folder} is there already")
            return
        if place.exists() and not place.is_dir():
            raise UserError(f"{folder} is no folder: move it away")
        begun = before.get("checkpoint") == UNFINISHED  # by a process that was killed
        if place.exists() and any(place.iterdir()) and not (replace or ours or begun):
            what = f"{folder} is there already and holds something else"
            raise UserError(f"{what}: remove it, or choose another --out")
        shutil.rmtree(new, ignore_errors=True)  # a killed process may have left it
        with written_whole(new) as aside:
            write(aside)
            files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
            written = {str(path.relative_to(aside)): path.stat().st_size for path in files}
            write_json(aside / MADE_FROM, source | {"written": written})
        if place.exists():
            try:
                refresh(place, new, written, before["written"])
            finally:
                shutil.rmtree(new, ignore_errors=True)
        else:
            new.rename(place)
    print(folder)


def refresh(folder: Path, new: Path, written: Mapping[str, int], before: Mapping[str, int]) -> None:
    """Replace the files `before` of an earlier export in a folder by the files `written` of `new`; every other file stays.

    Until all are in place, made_from.json says that the export is unfinished, and which files are of exports. Raises
    `UserError` where a file would be replaced that is of none, or that lies behind a link to another folder.
    """
    for name in written:
        file = folder / name
        if file.parent.resolve() != folder.resolve() / Path(name).parent:
            raise UserError(f"{file.parent} is a link to another folder: remove the link")
        if os.path.lexists(file) and name not in before:
            raise UserError(f"{file} is of no earlier export, and is not replaced: move it away")
    write_json(folder / MADE_FROM, {"checkpoint": UNFINISHED, "files": {}, "written": {**before, **written}})
    for name in before:
        (folder / name).unlink(missing_ok=True)
    for name in (*written, MADE_FROM):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)


def read_made_from(note: Path) -> MadeFrom:
    return read_record(note, MadeFrom, "remove it and export again")


def size_of(path: Path) -> int | None:
    """The size of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def export_kohya(run: RunFolder, checkpoint: Path, folder: Path) -> None:
    """`ema.safetensors` and `raw.safetensors` under the names of kohya's sd-scripts, fp16 as is usual there."""
    model, kohya_base = run_model(run, torch.bfloat16), family_for(run.config).kohya_base
    for kind, file in WEIGHTS.items():
        load_weights(checkpoint / file, model.trained_parameters())
        metadata = {"ss_base_model_version": kohya_base, "modelspec.title": run.name}
        save_file(kohya_weights(model, run.config.model.lora_alpha), folder / f"{kind}.safetensors", metadata)


def kohya_weights(
    model: AlignedModel, alpha: float, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """The LoRA of a model under the names of kohya's sd-scripts."""
    from diffusers.utils import convert_state_dict_to_kohya

    return {  # of alpha, diffusers takes it to be the rank
        name: torch.tensor(alpha) if name.endswith(".alpha") else value.detach().to(dtype).contiguous()
        for name, value in convert_state_dict_to_kohya(model.kohya_state_dict()).items()
    }


def export_pipeline(run: RunFolder, checkpoint: Path, folder: Path) -> None:
    """The base model's pipeline with the EMA weights' network, LoRA merged into it."""
    settings, model = run.config.model, run_model(run)
    load_weights(checkpoint / EMA, model.trained_parameters())
    family = model.family
    options = {family.part: model.merged_network(), "revision": settings.revision, **family.load_options}
    pipeline = load_pretrained(family.pipeline_class, settings.base, f"pipeline {settings.base}", **options)
    if (output := run.config.diffusion.parameterization) != "auto":
        pipeline.scheduler.register_to_config(prediction_type=SCHEDULER_TYPES[output])
    pipeline.save_pretrained(folder)


def load_lora(family: Backbone, folder: str) -> str:
    """The line of Python that loads exported LoRA into the family's pipeline."""
    if family.loads_lora:
        return f'pipe.load_lora_weights("{folder}")'
    return f'pipe.{family.part} = peft.PeftModel.from_pretrained(pipe.{family.part}, "{folder}")'


def model_card(run: RunFolder, step: int) -> str:
    """What the weights are, how to load them, what they were trained on and how far."""
    config, lora = run.config, run.config.model.train == "lora"
    base, family = config.model.base, family_for(run.config)
    pipeline, part, network = family.pipeline, family.part, family.network_class.__name__
    folder = Path(base)
    where = str(folder.resolve()) if folder.is_dir() else base  # the card may be read from anywhere
    needs = "" if family.loads_lora else "import peft\n"
    load = (
        f"{needs}from diffusers import {pipeline}\n\n"
        f"pipe = {pipeline}.from_pretrained({quoted(where)})\n"
        f'{load_lora(family, "ema")}  # or "raw"; from the folder of this card'
        if lora
        else f"from diffusers import {pipeline}, {network}\n\n"
        f'{part} = {network}.from_pretrained("ema", subfolder="{part}")  # or "raw"; from the folder of this card\n'
        f"pipe = {pipeline}.from_pretrained({quoted(where)}, {part}={part})"
    )
    commands = "\n".join(f"    {printable(command)}" for command in run.commands())
    reached = [line for line in run.metrics() if line["step"] <= step]
    last = {name: value for name, value in (reached or [{}])[-1].items() if name not in RATES}
    rows = "".join(f"| {markdown(name)} | {value:.6g} |\n" for name, value in last.items())
    measured = ""
    for point in (point for point in points_file(run.path / POINTS).read() if point["step"] == step):
        for name, found in point["metrics"].items():
            measured += f"- {code(name)}: {found['value']:.4g} ({markdown(point['kind'])})\n"
    names = {"lora": "LoRA", "partial": "Some blocks of the network", "full": "The network"}
    how = f"λ = {config.align.coeff:g}" if config.align.coeff > 0 else "λ = 0: a baseline, not aligned"
    tags = "\n".join(f"- {tag}" for tag in (*family.tags, "representation-alignment", *["lora"] * lora))
    return f"""---
base_model: {quoted(base)}
library_name: diffusers
tags:
{tags}
---

# {markdown(run.name)}

{names[config.model.train]} of {family.name} trained with {family.method} ({how}), step {step:,} of {config.train.steps:,}.
`ema/` holds the moving average, which is what evaluation uses, and `raw/` the last weights.

```python
{load}
```

Trained on the images of {code(config.data.csv)}, captioned by their class, by

{commands}

## Metrics of the training at step {step:,}

| | |
|---|---|
{rows}
{"Evaluated since:" if measured else "No evaluation was made before this was written."}

{measured}
## Config

{code_block(resolved_yaml(config), "yaml")}
"""


if __name__ == "__main__":
    run_script(main)
