"""One point: the images of a target under one protocol, measured, and written down once."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import UserError
from configs.evaluation import Eval
from evaluation.image_files import image_path
from evaluation.sample import Painter, draw_samples, labels_of, protocol_of, settings_of
from evaluation.score import Judge, judges_of, measure
from evaluation.targets import Target
from report.curves import append_point, read_points
from training.metric_log import MetricLog
from training.parts import Parts
from training.ranks import Ranks
from training.run_folder import RunFolder, this_command
from training.state import TrainingState

POINTS = Path("eval/points.jsonl")
KEPT = 100  # images that stay where eval.keep_images is false


def points_of(run: RunFolder) -> list[dict]:
    """Everything measured of a run, in the order in which it was measured."""
    return read_points(run.path / POINTS)


def evaluate_point(
    target: Target,
    chosen: Eval,
    judges: Sequence[Judge],
    device: torch.device,
    ranks: Ranks,
    *,
    kind: str,
    painter: Painter | None = None,
) -> dict:
    """The point of a target: what was measured of it before under this very protocol, or measured now.

    A point is a line of RUN/eval/points.jsonl: `kind` (curve, final, sweep, metrics), `step`, `images_seen`, `protocol` (what
    two points must share to be compared), `metrics` {name: {value, error, …}}, and how it was made.
    """
    settings = settings_of(target, chosen, device)
    protocol = protocol_of(target, settings) | {
        "num_samples": chosen.num_samples,
        "bootstrap": chosen.bootstrap,
        "judges": {judge.extractor.protocol: judge.identity for judge in judges},
    }
    known = ranks.on_main(lambda: _known(target, settings["model"], protocol, kind))
    if known is not None and known["kind"] == kind:
        return known
    if known is None:
        known = _measured(target, chosen, protocol, judges, device, ranks, painter)
    point = known | {"kind": kind}
    ranks.on_main(lambda: append_point(target.run.path / POINTS, point))
    if not chosen.keep_images:
        folder = target.run.path / point["samples"]
        kept = range(KEPT, chosen.num_samples)
        ranks.on_main(lambda: [image_path(folder, i).unlink(missing_ok=True) for i in kept])
    return point


def _known(target: Target, model: dict, protocol: dict, kind: str) -> dict | None:
    """The point that was measured of these weights under this protocol: for this purpose, or else for another."""
    found = [
        point for point in points_of(target.run) if point["protocol"] == protocol and point["model"] == model
    ]
    return next((point for point in found if point["kind"] == kind), found[-1] if found else None)


def _measured(
    target: Target,
    chosen: Eval,
    protocol: dict,
    judges: Sequence[Judge],
    device: torch.device,
    ranks: Ranks,
    painter,
) -> dict:
    indices = range(chosen.num_samples)
    started = time.monotonic()
    folder, settings = draw_samples(target, chosen, device, indices, ranks, painter=painter)
    drawn = time.monotonic()
    metrics = measure(folder, indices, labels_of(settings, indices), judges, chosen, device, ranks)
    measured = time.monotonic()
    return {
        "target": target.run.name,
        "step": target.step,
        "images_seen": target.images_seen,
        "model": settings["model"],
        "protocol": protocol,
        "metrics": metrics,
        "distance_of_halves": {j.extractor.protocol: j.reference.distance_of_halves for j in judges},
        "samples": str(folder.relative_to(target.run.path)),
        "command": this_command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {"samples": round(drawn - started, 1), "metrics": round(measured - drawn, 1)},
    }


def evaluate_all(
    targets: Sequence[Target], protocols: Sequence[Eval], device: torch.device, ranks: Ranks, *, kind: str
) -> list[dict]:
    """A point of each target under each protocol; all have the judges of the first protocol and of the first target's data, so
    that they can be compared."""
    for chosen in protocols:
        insist_measurable(targets, chosen, device, ranks)
    judges = judges_of(targets[0].run.config, protocols[0], device, ranks)
    points = []
    for target in targets:
        for chosen in protocols:
            point = evaluate_point(target, chosen, judges, device, ranks, kind=kind)
            if ranks.main:
                print(f"{target.name}: {said(point['metrics'])}", flush=True)
            points.append(point)
    return points


def said(metrics: Mapping[str, Mapping]) -> str:
    """The metrics in one line."""
    return ", ".join(
        f"{name} {found['value']:.4g}" + (f" ± {found['error']:.2g}" if found["error"] is not None else "")
        for name, found in metrics.items()
    )


def insist_measurable(targets: Sequence[Target], chosen: Eval, device: torch.device, ranks: Ranks) -> None:
    """Raise `UserError`, before anything is drawn, where the points of these targets would not be of one protocol, or where
    there are too few images."""
    if chosen.num_samples < max(4, ranks.world):
        raise UserError(
            f"eval.num_samples = {chosen.num_samples} is too few for metrics on {ranks.world} process(es): choose more"
        )
    first, *others = targets
    wanted = protocol_of(first, settings_of(first, chosen, device))
    for other in others:
        config, data = other.run.config, first.run.config.data
        found = protocol_of(other, settings_of(other, chosen, device))
        if differing := [key for key in wanted if found[key] != wanted[key]]:
            raise UserError(
                f"{other.run.path} and {first.run.path} cannot be compared: they differ in {', '.join(differing)}"
            )
        if config.data.csv != data.csv and not chosen.reference:
            raise UserError(
                f"{other.run.path} was trained on {config.data.csv}, {first.run.path} on {data.csv}: give both one "
                "eval.reference"
            )


class PeriodicEvaluation:
    """Points of a training's moving average while it goes on, as `evaluate_sd15.py curve` makes them of its checkpoints.

    Everything it needs is loaded, and complained about, before the first step. Weights, modes and random states are as before.
    """

    def __init__(self, parts: Parts):
        self.parts, config = parts, parts.config
        precision = "bf16" if parts.model.dtype == torch.bfloat16 else "fp32"
        self.chosen = config.eval.model_copy(update={"precision": precision, "compile": False})
        self.judges = judges_of(config, self.chosen, parts.device, parts.ranks)
        self.painter = Painter(
            parts.model.unet,
            config,
            sampler=self.chosen.sampler,
            parameterization=parts.loss.parameterization,
        )

    def due(self, step: int) -> bool:
        """Whether this step is to be measured; its checkpoint must have been written by then."""
        return step > 0 and step % self.parts.config.train.eval_every == 0

    def __call__(self, run: RunFolder, state: TrainingState, log: MetricLog) -> None:
        """Measure the moving average, unless that was done, and log it. Alone, what cannot be measured now is no reason to
        end a training: `evaluate_sd15.py curve` will say why."""
        parts, target = self.parts, Target(run, state.step, "ema")
        try:
            with parts.showing(state.ema.shadow_params):
                point = evaluate_point(
                    target,
                    self.chosen,
                    self.judges,
                    parts.device,
                    parts.ranks,
                    kind="curve",
                    painter=self.painter,
                )
        except (UserError, OSError) as error:
            if parts.ranks.world > 1:
                raise
            tqdm.write(f"warning: step {state.step} was not evaluated: {error}")
            return
        log.scalars({f"eval/{name}": found["value"] for name, found in point["metrics"].items()}, state.step)
