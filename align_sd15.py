"""Measure on held-out images how much of the teacher's geometry a U-Net's hidden features hold.

A run is measured beside its bare base model, at all three taps and at several timesteps, before and after its heads, each
metric with its null: `evaluation/alignment_rows.py` says what they are. Called by `evaluate_sd15.py align`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from build_sd15 import load_run_model
from configs.loading import with_settings
from configs.schema import Config
from errors import UserError
from evaluation.alignment_metrics import mispair, pool_tokens, split_by_image
from evaluation.alignment_rows import (
    CKNNA_K,
    TIMESTEPS,
    TeacherSide,
    cca_components,
    head_metrics,
    nearest_timestep,
    tap_metrics,
    value_of,
)
from evaluation.embedding import Source, embed_sources
from evaluation.plot_alignment import plot_embedding, plot_timesteps
from evaluation.spatial_metrics import distances_on
from files import write_json
from heldout_sd15 import Bench, heldout_images
from models.alignment import spatial_norm
from models.sd15_unet_aligned import SD15UNetAligned, sd15_taps
from models.taps import Taps
from preprocessing.manifest import class_names, read_manifest
from target_sd15 import Target
from training.run_folder import this_command

EMBEDDED_TAP = "mid"
EMBEDDINGS = {"tsne": "t-SNE", "umap": "UMAP"}


@dataclass(frozen=True)
class HeadTokens:
    """A head's tokens averaged over the cells of its tap's grid (n, T, D), and the cosine of each image's tokens with the
    teacher's, and with those of another image, on the teacher's grid (n,)."""

    pooled: np.ndarray
    cosine: np.ndarray
    null_cosine: np.ndarray


def align_target(target: Target, args: argparse.Namespace, device: torch.device) -> None:
    """Measure a target beside its base model and write RUN/eval/align.json and its pictures."""
    run, config = target.run, target.run.config
    seed = with_settings(config, {} if args.seed is None else {"eval.seed": args.seed}).eval.seed
    models = {"base": load_run_model(run, 0, device, weights="base")[0]}
    if target.weights != "base":
        models = {"run": load_run_model(run, target.step, device, weights=target.weights)[0]} | models
    measured, sources = measure_alignment(
        config, models, timesteps=args.timesteps, seed=seed, device=device, num_images=args.num_images
    )
    result = {"step": target.step, "command": this_command()} | measured | {"weights": target.weights}
    folder = run.path / "eval"
    write_json(folder / "align.json", result)
    names = class_names(read_manifest(config.data.text, "text"))
    draw_alignment(folder, run.name, result, sources, class_names=names, embedding=args.embedding)
    print(f"{target.name}, {result['num_images']} of {result['num_available']} held-out images")
    print(summary(result))


@torch.no_grad()
def measure_alignment(
    config: Config,
    models: Mapping[str, SD15UNetAligned],
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int,
    device: torch.device,
    num_images: int | None = None,
) -> tuple[dict, dict[tuple[str, str], Source]]:
    """What `align.json` holds but for step and command, and the sources of the embedding at one timestep of the mid tap.

    Args:
        config: of the run: its held-out images, teacher, noise schedule and batch size.
        models: {"run": …, "base": …}, in eval mode on `device`; either may be absent. Only the run's heads are looked at.
        timesteps: noise levels, 0 (clean) to 999.
        seed: image i of the list has the noise of seed + i at every timestep; also of the split into halves and of all nulls.
        num_images: the first so many held-out images of the list; None takes 1000, or all where there are fewer.

    The sources' keys are (model, "head" | "tap"): the head's tokens where the run has a head, and each model's ridge map.
    Raises `UserError` for settings and caches that do not fit.
    """
    timesteps = checked_timesteps(timesteps)
    held = heldout_images(config, num_images)
    n, heads = len(held.latents), {name: heads_of(name, model) for name, model in models.items()}
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
                features, grids, tokens = _read_taps(bench, model, heads[name], timestep)
                if not sides:
                    sides, k = _teacher_sides(bench, features, grids)
                for tap, side in sides.items():
                    bar.set_description(f"{name}, timestep {timestep}: {tap}")
                    metrics, projected = tap_metrics(features.pop(tap), side)  # popped: memory given back
                    found = {"tap": (metrics, projected)}
                    if tap in tokens:
                        bar.update()
                        head = tokens.pop(tap)
                        metrics = head_metrics(
                            head.pooled, head.cosine.mean().item(), head.null_cosine.mean().item(), side
                        )
                        found["head"] = (metrics, head.pooled)
                    bar.update()
                    for kind, (metrics, _) in found.items():
                        where = {"model": name, "tap": tap, "timestep": timestep, "features": kind}
                        rows.append({**where, "metrics": metrics})
                    if tap == EMBEDDED_TAP and timestep == nearest_timestep(timesteps):
                        sources |= {
                            (name, kind): _source(bench, side, kind, x) for kind, (_, x) in found.items()
                        }
    fit, test = split_by_image(n, seed)
    result = {
        "num_images": n,
        "num_available": held.available,
        "n_fit": len(fit),
        "n_test": len(test),
        "seed": seed,
        "noise": "image i of the list has the noise of seed + i, at every timestep",
        "timesteps": list(timesteps),
        "taps": list(grids),
        "tap_grids": {tap: list(found) for tap, found in grids.items()},
        "teacher_grid": [config.teacher.grid] * 2,
        "prompt": "null",
        "weights": "ema",
        "cca_k": k,
        "cknna_k": CKNNA_K,
        "spatial_distances": {tap: vars(distances_on(found)) for tap, found in grids.items()},
        "heldout_loss_diff": losses.get("run"),
        "heldout_loss_diff_base": losses.get("base"),
        "rows": rows,
        "teacher": {tap: side.metrics() for tap, side in sides.items()},
    }
    return result, sources


def draw_alignment(
    folder: Path,
    name: str,
    result: Mapping,
    sources: Mapping[tuple[str, str], Source],
    *,
    class_names: Mapping[int, str],
    embedding: str = "tsne",
) -> None:
    """Write `align_timesteps.png` and `align_tsne.png`, and the picture of the other embedding, if it is asked for."""
    said = f"{result['num_images']} held-out images, EMA weights, null prompt"
    plot_timesteps(folder / "align_timesteps.png", result, f"{name}, step {result['step']:,}: {said}")
    h, w = result["tap_grids"][EMBEDDED_TAP]
    shown = nearest_timestep(result["timesteps"])
    called = {
        ("run", "head"): f"{name}: head's tokens",
        ("run", "tap"): f"{name}: ridge map of mid-block",
        ("base", "tap"): "bare base model: ridge map of mid-block",
    }
    drawn = {called[key]: sources[key] for key in called if key in sources}
    for method in dict.fromkeys(("tsne", embedding)):
        title = (
            f"Joint {EMBEDDINGS[method]} of tokens on the mid-block's {h} × {w} cells, timestep {shown}, held-out images\n"
            "distances between clusters mean nothing"
        )
        panels = embed_sources(drawn, seed=result["seed"], method=method)
        plot_embedding(folder / f"align_{method}.png", panels, class_names, title)


def summary(result: Mapping) -> str:
    """Two lines for the terminal: the run and its base at the timestep that figures show."""
    shown, lines = nearest_timestep(result["timesteps"]), []
    for model, loss in (("run", result["heldout_loss_diff"]), ("base", result["heldout_loss_diff_base"])):
        numbers = []
        for metric in ("cca", "cknna"):
            value, null = (
                value_of(result, metric, which, model=model, timestep=shown) for which in ("value", "null")
            )
            found = "undefined" if value is None else f"{value:.3f} (null {null:.3f})"
            numbers.append(f"{metric.upper()} {found}")
        lines.append(
            f"  {model:4} at timestep {shown}: mid-block {', '.join(numbers)}, held-out loss {loss:.4f}"
        )
    return "\n".join(lines)


def checked_timesteps(timesteps: Sequence[int], num_steps: int = 1000) -> tuple[int, ...]:
    """Timesteps in order, once each; raises `UserError` for none, or for one outside of the schedule."""
    wrong = [t for t in timesteps if not 0 <= t < num_steps]
    if wrong or not timesteps:
        raise UserError(
            f"--timesteps are noise levels from 0 (clean) to {num_steps - 1} (noise), got "
            f"{', '.join(map(str, wrong)) or 'none'}"
        )
    return tuple(sorted(set(timesteps)))


def heads_of(name: str, model: SD15UNetAligned) -> dict[str, torch.nn.Module]:
    """The trained heads; those of a base model, if it has any, were never trained."""
    return dict(model.heads) if name == "run" else {}


def _read_taps(
    bench: Bench, model: SD15UNetAligned, heads: Mapping[str, torch.nn.Module], timestep: int
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]], dict[str, HeadTokens]]:
    """At all taps in one forward: features (n, T, C) and grid of each, and the tokens of those heads that there are.

    Each batch goes to the CPU at once, and a head's tokens are averaged over the tap's cells there: on the teacher's own
    grid they would be three times as many numbers, and up-sampled cells are no new samples.
    """
    teacher, grid, n = bench.held.teacher, (bench.config.teacher.grid,) * 2, len(bench.held.latents)
    other = mispair(np.arange(n), np.random.default_rng([bench.seed, 8]))  # (n,)
    features, grids, pooled, cosines = {}, {}, {}, {tap: np.empty((2, n)) for tap in heads}
    with _listening(model) as taps:
        for start, x_0, noise, text in bench.batches():
            rows = slice(start, start + len(x_0))
            with taps.recording():
                bench.predict(model, x_0, noise, text, torch.full((len(x_0),), timestep, device=x_0.device))
            for tap, feature in taps.captured.items():  # (b, C, h, w)
                grids[tap] = tuple(feature.shape[-2:])
                _insist_coarser(tap, grids[tap], grid[0])
                cells = feature.float().flatten(2).transpose(1, 2).cpu().numpy()  # (b, T, C)
                _insist_finite(cells, tap, timestep)
                _put(features, tap, rows, cells, n)
            for tap, head in heads.items():
                tokens = head(taps.captured[tap])  # (b, N, D)
                for place, images in enumerate((np.arange(n)[rows], other[rows])):
                    target = _target(
                        bench.config, torch.from_numpy(teacher[images]).to(x_0.device)
                    )  # (b, N, D)
                    cosine = torch.nn.functional.cosine_similarity(tokens, target, dim=-1).mean(1)  # (b,)
                    cosines[tap][place, rows] = cosine.cpu().numpy()
                _put(pooled, tap, rows, pool_tokens(tokens.cpu().numpy(), grid, grids[tap]), n)
    return features, grids, {tap: HeadTokens(pooled[tap], *cosines[tap]) for tap in heads}


@contextmanager
def _listening(model: SD15UNetAligned) -> Iterator[Taps]:
    """Taps at all three places, also where the run itself taps fewer; they leave when the block ends."""
    taps = Taps(model.unet, sd15_taps(model.unet))
    try:
        yield taps
    finally:
        taps.remove()


def _teacher_sides(bench: Bench, features, grids) -> tuple[dict[str, TeacherSide], int]:
    """The teacher on each tap's grid, shared by taps of equal grids, and the number of CCA's components."""
    held, grid = bench.held, (bench.config.teacher.grid,) * 2
    widths = (held.teacher.shape[-1], *(x.shape[-1] for x in features.values()))
    k = cca_components(len(held.teacher), min(h * w for h, w in grids.values()), *widths)
    made = {
        found: TeacherSide.on(found, held.teacher, grid, held.classes, k=k, seed=bench.seed)
        for found in set(grids.values())
    }
    return {tap: made[found] for tap, found in grids.items()}, k


def _target(config: Config, teacher: Tensor) -> Tensor:
    """What the heads are trained towards."""
    alpha = config.align.spatial_norm
    return teacher if alpha is None else spatial_norm(teacher, alpha)


def _source(bench: Bench, side: TeacherSide, kind: str, projected: np.ndarray) -> Source:
    """Of the ridge map (n_test, T, D), or of a head's tokens (n, T, D): the test half, beside what each is to be like."""
    test = split_by_image(len(side.tokens), side.seed)[1]
    if kind == "tap":
        return Source(projected, side.tokens[test], side.classes[test])
    target = _target(bench.config, torch.from_numpy(bench.held.teacher[test])).numpy()  # (n_test, N, D)
    target = pool_tokens(target, (bench.config.teacher.grid,) * 2, side.grid)  # (n_test, T, D)
    return Source(projected[test], target, side.classes[test])


def _put(arrays: dict[str, np.ndarray], tap: str, rows: slice, values: np.ndarray, n: int) -> None:
    """Write a batch into the array of its tap, made at the first: joining batches at the end would need all of it twice."""
    if tap not in arrays:
        arrays[tap] = np.empty((n, *values.shape[1:]), values.dtype)
    arrays[tap][rows] = values


def _insist_coarser(tap: str, grid: tuple[int, int], teacher_grid: int) -> None:
    if max(grid) > teacher_grid:
        raise UserError(
            f"the grid {grid[0]} × {grid[1]} of tap {tap} is finer than the teacher's {teacher_grid}: cache more tokens"
        )


def _insist_finite(features: np.ndarray, tap: str, timestep: int) -> None:
    if not np.isfinite(features).all():
        raise UserError(
            f"features of tap {tap} at timestep {timestep} are not finite: the run has diverged, choose an earlier --checkpoint"
        )
