"""Points: the metrics of one target under one protocol, each measured once and kept as a line of points.jsonl."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch
from tqdm import tqdm

from cache.text import TextReader
from common.errors import UserError, is_mendable, one_line
from configs.evaluation import FEWEST_MEASURED
from evaluation.image_files import image_path
from evaluation.sample import ImageSampler, draw_samples, image_recipe, labels_of, protocol_of
from evaluation.score import Scorer, load_scorers, measure
from evaluation.score_clips import ClipScorer, load_clip_scorer
from evaluation.targets import Target
from metrics.quality import METRICS
from report.records import Point, format_value, points_file
from training.metric_log import MetricLog
from training.parts import Parts
from training.ranks import Ranks
from training.run_folder import POINTS, RunFolder, this_command
from training.state import TrainingState

KEPT = 100  # images that stay where eval.keep_images is false


def points_of(run: RunFolder) -> list[Point]:
    """Everything measured of a run, in the order in which it was measured."""
    return points_file(run.path / POINTS).read()


def evaluate_point(
    target: Target,
    scorers: Sequence[Scorer],
    device: torch.device,
    ranks: Ranks,
    *,
    kind: str,
    image_sampler: ImageSampler | None = None,
    clip_scorer: ClipScorer | None = None,
) -> dict:
    """The point of a target under its settings: the one that was measured before, or a new one.

    A point is a line of RUN/eval/points.jsonl: `kind` (curve, final, sweep, metrics), `step`, `images_seen`, `protocol` (two
    points can be compared if theirs are equal), `metrics` {name: {value, error, …}}, and how it was made.
    """
    recipe, settings = image_recipe(target, device), target.settings
    indices = range(settings.num_samples)
    protocol = protocol_of(target, recipe) | {
        "num_samples": settings.num_samples,
        "bootstrap": settings.bootstrap,
        "judges": {scorer.extractor.protocol: scorer.identity for scorer in scorers},
    }
    if clip_scorer is not None:
        protocol["real_clips"] = clip_scorer.identity
    point = ranks.on_main(lambda: _find_known(target, recipe["model"], protocol, kind))
    if point is not None and point["kind"] == kind:
        return point
    if point is None:
        started = time.monotonic()
        folder, _ = draw_samples(target, device, indices, ranks, image_sampler=image_sampler)
        drawn = time.monotonic()
        labels, captions = labels_of(recipe, indices), []
        if not _has_classes(recipe):
            prompts = TextReader(target.config.data.text).prompts
            captions = [prompts[label] for label in labels]
        frames = recipe.get("frames")
        metrics = measure(folder, indices, captions or labels, scorers, settings, device, ranks, frames)
        if clip_scorer is not None:
            metrics |= clip_scorer.compare(folder, indices, settings, ranks, captions)
        measured = time.monotonic()
        point = {
            "target": target.run.name,
            "step": target.step,
            "images_seen": target.images_seen,
            "model": recipe["model"],
            "protocol": protocol,
            "metrics": metrics,
            "distance_of_halves": {s.extractor.protocol: s.reference.distance_of_halves for s in scorers},
            "samples": str(folder.relative_to(target.run.path)),
            "command": this_command(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {"samples": round(drawn - started, 1), "metrics": round(measured - drawn, 1)},
        }
    point = point | {"kind": kind}
    # Another process may have measured the same meanwhile: then its point stays.
    same = ("kind", "protocol", "model")
    there = points_file(target.run.path / POINTS)
    ranks.on_main(
        lambda: there.append(point, unless=lambda other: all(other[key] == point[key] for key in same))
    )
    if not settings.keep_images:
        surplus = [image_path(target.run.path / point["samples"], i) for i in indices[KEPT:]]
        ranks.on_main(lambda: [path.unlink(missing_ok=True) for path in surplus])
    return point


def _find_known(target: Target, model: dict, protocol: dict, kind: str) -> dict | None:
    """The point of these weights under this protocol that was measured before: of this kind, or else of another."""
    wanted = protocol, model
    found = [point for point in points_of(target.run) if (point["protocol"], point["model"]) == wanted]
    return next((point for point in found if point["kind"] == kind), found[-1] if found else None)


def evaluate_all(targets: Sequence[Target], device: torch.device, ranks: Ranks, *, kind: str) -> list[dict]:
    """The points of all targets, in order; all are measured by the extractors and the references of the first."""
    for first in targets:
        alike = [target for target in targets if target.settings == first.settings]
        if alike[0] is first:
            check_comparable(alike, device, ranks)
    config = targets[0].config
    scorers, clip_scorer = load_scorers(config, device, ranks), load_clip_scorer(config, device)
    judges = [scorer for scorer in scorers if "accuracy" in METRICS[scorer.extractor.protocol]]
    if ranks.main and judges and not _has_classes(image_recipe(targets[0], device)):
        prompts = TextReader(config.data.text).prompts
        if all(judge.intended(prompts) is None for judge in judges):
            left_out = "the accuracy by class is left out"
            print(f"the prompts are captions, and not each names one class of the classifier: {left_out}")
    points = []
    for target in targets:
        point = evaluate_point(target, scorers, device, ranks, kind=kind, clip_scorer=clip_scorer)
        if ranks.main:
            print(f"{target.name}: {format_metrics(point['metrics'])}", flush=True)
        points.append(point)
    return points


def _has_classes(recipe: Mapping) -> bool:
    """Return whether the prompts of these settings of images are those of classes, made by a template."""
    return recipe["prompts"] is not None


def format_metrics(metrics: Mapping[str, Mapping]) -> str:
    """The metrics in one line."""
    return ", ".join(f"{name} {format_value(found)}" for name, found in metrics.items())


def check_comparable(targets: Sequence[Target], device: torch.device, ranks: Ranks) -> None:
    """Check, before anything is drawn, that the points of these targets will have one protocol, and enough images for metrics.

    The targets have equal settings. Raises `UserError`.
    """
    first, *others = targets
    if first.settings.num_samples < (fewest := max(FEWEST_MEASURED, ranks.world)):
        raise UserError(
            f"eval.num_samples = {first.settings.num_samples} is too few for metrics on {ranks.world} process(es): choose "
            f"{fewest} or more"
        )
    wanted = protocol_of(first, image_recipe(first, device))
    for other in others:
        config, data = other.config, first.config.data
        found = protocol_of(other, image_recipe(other, device))
        if differing := [key for key in wanted if found[key] != wanted[key]]:
            raise UserError(
                f"{other.run.path} and {first.run.path} cannot be compared: they differ in {', '.join(differing)}"
            )
        if config.data.csv != data.csv and not first.settings.reference:
            raise UserError(
                f"{other.run.path} was trained on {config.data.csv}, {first.run.path} on {data.csv}: give both one "
                "eval.reference"
            )


class PeriodicEvaluation:
    """Measures the moving average while a training goes on, as `evaluate.py curve` measures its checkpoints.

    Everything it needs is loaded and checked before the first step. It leaves weights, modes and random states as they were.
    """

    def __init__(self, parts: Parts):
        self.parts, config = parts, parts.config
        precision = "bf16" if parts.model.dtype == torch.bfloat16 else "fp32"
        self.settings = config.eval.model_copy(update={"precision": precision, "compile": False})
        self.scorers = load_scorers(config, parts.device, parts.ranks)
        self.clip_scorer = load_clip_scorer(config, parts.device)
        self.image_sampler = ImageSampler(parts.model, config, parts.dataset.text)

    def due(self, step: int) -> bool:
        """Whether this step is to be measured; its checkpoint must have been written by then."""
        return step > 0 and step % self.parts.config.train.eval_every == 0

    def __call__(self, run: RunFolder, state: TrainingState, log: MetricLog) -> None:
        """Measure the moving average, unless that was done before, and log it.

        On a single process a failed evaluation is only a warning: `evaluate.py curve` gives the reason.
        """
        parts, target = self.parts, Target(run, state.step, "ema", self.settings)
        try:
            with parts.showing(state.ema.shadow_params):
                how = {"kind": "curve", "image_sampler": self.image_sampler, "clip_scorer": self.clip_scorer}
                point = evaluate_point(target, self.scorers, parts.device, parts.ranks, **how)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if parts.ranks.world > 1 or not is_mendable(error):
                raise
            tqdm.write(f"warning: step {state.step} was not evaluated: {one_line(error):.300}")
            return
        log.scalars({f"eval/{name}": found["value"] for name, found in point["metrics"].items()}, state.step)
