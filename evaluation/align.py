"""Measure on held-out images how similar a network's hidden features are to the teacher's tokens.

A run is measured beside its bare base model, at all taps of its family and at several timesteps, before and after its heads,
each metric with its null: `metrics/similarity_rows.py` defines them. Called by `evaluate.py align`.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cache.text import class_names
from common.errors import UserError
from common.files import write_json
from configs.schema import Config
from evaluation.heldout import Bench, heldout_images, read_taps, target_of
from evaluation.targets import Target
from metrics.embedding import Source, embed_sources
from metrics.similarity import pool_tokens, split_by_image
from metrics.similarity_rows import (
    CKNNA_K,
    TIMESTEPS,
    TeacherSide,
    cca_components,
    head_metrics,
    nearest_timestep,
    row_of,
    tap_metrics,
)
from metrics.spatial import distances_on
from models.aligned import AlignedModel
from report.material import WEIGHT_WORDS
from report.plot_alignment import plot_embedding, plot_timesteps
from report.records import format_grid
from training.parts import build_path, family_for, load_run_model
from training.run_folder import this_command

NO_CLASS = -1  # stands for the class of captioned images, which are drawn in one colour
EMBEDDINGS = {"tsne": "t-SNE", "umap": "UMAP"}

# By model, and "head" for the head's tokens where the run has one, or "tap" for a model's ridge map.
Sources = dict[tuple[str, str], Source]


def align_target(
    target: Target,
    device: torch.device,
    *,
    timesteps: Sequence[int],
    num_images: int | None,
    with_base: bool,
    embedding: str,
) -> None:
    """Measure a target, beside its base model unless `with_base` is false, and write RUN/eval/align.json and its pictures.

    `timesteps` and `num_images` are those of `measure_alignment`; `embedding` "umap" draws that picture too.
    """
    run, config, step = target.run, target.config, target.step
    weights = {} if target.weights == "base" else {"run": target.weights}
    if with_base or not weights:
        weights["base"] = "base"
    models = {name: load_run_model(run, step, device, weights=which) for name, which in weights.items()}
    found, sources = measure_alignment(config, models, device, timesteps, num_images)
    result = {"step": step, "command": this_command()} | found | {"weights": target.weights}
    # Of a checkpoint that is not the newest: files of its own, so that it replaces nothing.
    older = target.weights != "base" and step != run.checkpoint_steps()[-1]
    folder = run.path / "eval" / (f"step-{step:07d}" if older else "")
    write_json(folder / "align.json", result)
    draw_alignment(folder, target, result, sources, embedding)
    print(f"{target.name}, {result['num_images']} of {result['num_available']} held-out images")
    print(summary(result))


@torch.no_grad()
def measure_alignment(
    config: Config,
    models: Mapping[str, AlignedModel],
    device: torch.device,
    timesteps: Sequence[int] = TIMESTEPS,
    num_images: int | None = None,
) -> tuple[dict, Sources]:
    """Return the contents of align.json (without step and command), and the inputs of the main tap's embedding.

    The run's `config` names held-out images, teacher, noise schedule, batch size and seed, on which noise, halves and all nulls
    depend. `models` {"run": …, "base": …} are in eval mode on `device`; either may be absent. `num_images` are taken from the
    beginning of the list; None takes 1000, or all where there are fewer. Raises `UserError` for what does not fit.
    """
    held = heldout_images(config, num_images)
    num_timesteps = build_path(config.diffusion, family_for(config), held.latents.shape[1:]).num_steps
    timesteps, main_tap = check_timesteps(timesteps, num_timesteps), main_tap_of(models)
    n, seed = len(held.latents), config.eval.seed
    # A base model may have heads, but they were never trained; and those of a run that was taught by its own block make
    # tokens of that block, not of the outside teacher that all runs are compared with.
    outside = config.teacher.source != "backbone"
    heads = {name: dict(model.heads) if name == "run" and outside else {} for name, model in models.items()}
    rows, losses, sources, sides = [], {}, {}, {}
    forwards = -(-n // config.eval.batch_size) * (1 + len(timesteps))  # batches of one model
    steps = sum(forwards + len(timesteps) * (3 + len(found)) for found in heads.values())
    with tqdm(total=steps, unit="step") as bar:
        bench = Bench(config, held, seed, device, bar.update)
        for name, model in models.items():
            bar.set_description(f"{name}: held-out loss")
            losses[name] = bench.heldout_loss(model)
            for timestep in timesteps:
                bar.set_description(f"{name}, timestep {timestep}: features")
                features, grids, tokens = read_taps(bench, model, heads[name], timestep)
                if not sides:
                    sides, k = _teacher_sides(bench, features, grids)
                for tap, side in sides.items():
                    bar.set_description(f"{name}, timestep {timestep}: {tap}")
                    found = {"tap": tap_metrics(features.pop(tap), side)}  # popped: memory given back
                    if tap in tokens:
                        bar.update()
                        head = tokens.pop(tap)
                        measured = head_metrics(head.pooled, head.cosine, head.null_cosine, side)
                        found["head"] = measured, head.pooled
                    bar.update()
                    for kind, (metrics, projected) in found.items():
                        where = {"model": name, "tap": tap, "timestep": timestep, "features": kind}
                        rows.append({**where, "metrics": metrics})
                        if tap == main_tap and timestep == nearest_timestep(timesteps):
                            sources[name, kind] = _source(bench, side, kind, projected)
    fit, test = split_by_image(n, seed)
    result = {
        "num_images": n, "num_available": held.available, "n_fit": len(fit), "n_test": len(test), "seed": seed,
        "images_sha256": held.images_sha256, "teacher_sha256": held.teacher_sha256,
        "noise": "image i of the list has the noise of seed + i, at every timestep", "prompt": "null",
        "timesteps": list(timesteps), "num_timesteps": num_timesteps, "taps": list(grids), "main_tap": main_tap,
        "tap_grids": {tap: list(found) for tap, found in grids.items()},
        "teacher_grid": list(bench.teacher_grid), "cca_k": k, "cknna_k": CKNNA_K,
        "spatial_distances": {tap: vars(distances_on(found[-2:])) for tap, found in grids.items()},
        "heldout_loss_diff": losses.get("run"), "heldout_loss_diff_base": losses.get("base"), "rows": rows,
        "teacher": {tap: side.metrics() for tap, side in sides.items()},
    }  # fmt: skip
    return result, sources


def draw_alignment(folder: Path, target: Target, result: Mapping, sources: Sources, embedding: str) -> None:
    """Write `align_timesteps.png`, `align_tsne.png`, and with `embedding` "umap" `align_umap.png` too."""
    name, names = target.run.name, dict(enumerate(class_names(target.config.data.text)))
    names |= {NO_CLASS: "all images"}
    weights = WEIGHT_WORDS.get(result["weights"], result["weights"])
    conditions = f"{result['num_images']} held-out images, {weights} weights, null prompt"
    plot_timesteps(folder / "align_timesteps.png", result, f"{name}, step {result['step']:,}: {conditions}")
    grid = format_grid(result["tap_grids"][result["main_tap"]])
    shown, tap = nearest_timestep(result["timesteps"]), result["main_tap"]
    called = {
        ("run", "head"): f"{name}: head's tokens",
        ("run", "tap"): f"{name}: ridge map of {tap}",
        ("base", "tap"): f"bare base model: ridge map of {tap}",
    }
    drawn = {called[key]: sources[key] for key in called if key in sources}
    for method in dict.fromkeys(("tsne", embedding)):
        title = (
            f"Joint {EMBEDDINGS[method]} of tokens on the {grid} cells of {tap}, timestep {shown}, held-out images\n"
            "distances between clusters mean nothing"
        )
        panels = embed_sources(drawn, seed=result["seed"], method=method)
        plot_embedding(folder / f"align_{method}.png", panels, names, title)


def summary(result: Mapping) -> str:
    """One line for each model that was measured, at the timestep that figures show."""
    shown, lines = nearest_timestep(result["timesteps"]), []
    for model, loss in (("run", result["heldout_loss_diff"]), ("base", result["heldout_loss_diff_base"])):
        if loss is None:
            continue
        line = f"  {model:4} at timestep {shown}: {result['main_tap']}"
        for metric in ("cca", "cknna"):
            found = row_of(result, model=model, timestep=shown)[metric]
            value, null = found["value"], found["null"]
            numbers = "undefined" if value is None else f"{value:.3f} (null {null:.3f})"
            line += f" {metric.upper()} {numbers},"
        lines.append(f"{line} held-out loss {loss:.4f}")
    return "\n".join(lines)


def main_tap_of(models: Mapping[str, AlignedModel]) -> str:
    """The tap that a table of one tap shows: the family's, or the run's own first where it aligns others."""
    model = models.get("run") or models["base"]
    main, own = model.family.main_tap(model.backbone), list(model.heads)
    return own[0] if own and main not in own else main


def check_timesteps(timesteps: Sequence[int], num_timesteps: int) -> tuple[int, ...]:
    """Sort timesteps and drop repeats; raises `UserError` for none, or for one outside the noise schedule."""
    wrong = [str(t) for t in timesteps if not 0 <= t < num_timesteps]
    if wrong or not timesteps:
        levels = f"noise levels from 0 (clean) to {num_timesteps - 1} (noise)"
        raise UserError(f"--timesteps are {levels}, got {', '.join(wrong) or 'none'}")
    return tuple(sorted(set(timesteps)))


def _teacher_sides(bench: Bench, features, grids) -> tuple[dict[str, TeacherSide], int]:
    """The teacher's tokens on the grid of each tap (one object a grid), and the number of CCA's components."""
    held, grid = bench.held, bench.teacher_grid
    widths = (held.teacher.shape[-1], *(x.shape[-1] for x in features.values()))
    k = cca_components(len(held.teacher), min(map(prod, grids.values())), *widths)
    known = {"k": k, "seed": bench.seed}
    made = {g: TeacherSide.on(g, held.teacher, grid, held.classes, **known) for g in set(grids.values())}
    return {tap: made[found] for tap, found in grids.items()}, k


def _source(bench: Bench, side: TeacherSide, kind: str, projected: np.ndarray) -> Source:
    """The test half of `projected`, beside the tokens that it should equal.

    `projected` is a ridge map's output (n_test, T, D), or a head's tokens (n, T, D).
    """
    test = split_by_image(len(side.tokens), side.seed)[1]
    classes = np.full(len(test), NO_CLASS) if side.classes is None else side.classes[test]  # (n_test,)
    if kind == "tap":
        return Source(projected, side.tokens[test], classes)
    target = target_of(bench.config, torch.from_numpy(bench.held.teacher[test])).numpy()  # (n_test, N, D)
    target = pool_tokens(target, bench.teacher_grid, side.grid)  # (n_test, T, D)
    return Source(projected[test], target, classes)
