"""Gather the evaluation results of run folders for the page. Measures nothing and draws no sample."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache.manifest import read_manifest
from cache.text import class_names
from common.errors import UserError
from evaluation.image_files import load_images, missing_images
from evaluation.points import points_of
from evaluation.sample import labels_of
from evaluation.targets import find_baseline, labels_for
from report.assemble import write_report
from report.curves import draw_curves, points_under, protocols
from report.material import MADE_BY, Material, Pictures, RunFacts, describe_protocol, points_at
from report.section_alignment import alignment_figures
from training.run_folder import RunFolder

GRID_ROWS, GRID_COLUMNS = 6, 10
CLASSES, GROWING = 8, 3  # of which one image is shown: by final numbers, and at every checkpoint


def make_report(
    page: Path, runs: Sequence[RunFolder], *, baseline: Path | None, times: Sequence[Mapping], command: str
) -> Path:
    """Write the page about these runs, and its figures to PAGE_figures/; returns its path."""
    labelled = dict(zip(labels_for(runs), runs, strict=True))
    facts = {label: facts_of(run) for label, run in labelled.items()}
    if not any(run.points or run.alignment for run in facts.values()):
        raise UserError(
            f"nothing was measured of {', '.join(str(run.path) for run in runs)}: run `curve`, `final` or `align` first"
        )
    folder = page.with_name(f"{page.stem}_figures")
    compared = find_baseline(labelled, baseline)
    protocol = shared_protocol(facts)
    curve, figures = None, []
    if protocol is not None:
        curves = {label: points_under(run.points, protocol, MADE_BY) for label, run in facts.items()}
        base_models = [label for label, run in facts.items() if run.is_base]
        curve = draw_curves(folder, curves, compared, base_models)
        figures = [folder / name for name in ("curve.png", "curve_all.png")]
    names = class_names(read_manifest(runs[0].config.data.text, "text"))
    drawn = DrawnImages(labelled, facts, names)
    return write_report(
        page,
        Material(
            runs=facts,
            baseline=compared,
            curve=curve,
            curve_figures=[path for path in figures if path.exists()],
            grids=drawn.grids(protocol),
            grid_columns=[names.get(i, f"class {i}") for i in range(min(GRID_COLUMNS, len(names)))],
            pictures=drawn.pictures(protocol),
            times=times,
            command=command,
            folder=folder,
        ),
    )


def facts_of(run: RunFolder) -> RunFacts:
    """Read the records of a run folder."""
    alignment = run.path / "eval" / "align.json"
    try:
        found = json.loads(alignment.read_text(encoding="utf-8")) if alignment.exists() else None
    except ValueError:
        found = {}
    if found is not None and (not isinstance(found, dict) or "rows" not in found):
        raise UserError(f"{alignment} is damaged: run `align {run.path}` again")
    return RunFacts(
        is_base=run.is_base_model,
        settings=run.settings(),
        commands=run.commands(),
        log=run.metrics(),
        points=points_of(run),
        alignment=found,
        figures=alignment_figures(run.path / "eval"),
    )


def shared_protocol(facts: Mapping[str, RunFacts]) -> Mapping | None:
    """The protocol of curves that most runs share; of equals the one with most points, then the one with most images."""
    points = [point for run in facts.values() for point in run.points if point["kind"] in MADE_BY]
    known = protocols(points)
    if not known:
        return None
    return max(
        known,
        key=lambda p: (len(found := points_at(facts, p)), sum(map(len, found.values())), p["num_samples"]),
    )


class DrawnImages:
    """Arranges images that were drawn before in rows and columns."""

    def __init__(
        self, runs: Mapping[str, RunFolder], facts: Mapping[str, RunFacts], names: Mapping[int, str]
    ):
        self.runs, self.facts, self.names = runs, facts, names

    def grids(self, protocol: Mapping | None) -> dict[str, np.ndarray]:
        """The first images of each run at its last step under a protocol; none where classes are random."""
        if protocol is None or protocol["labels"] != "balanced":
            return {}
        columns = min(GRID_COLUMNS, len(self.names))
        count = min(GRID_ROWS * columns, protocol["num_samples"] // columns * columns)
        if len(self.names) > columns:
            count = min(count, columns)  # image i shows class i: a second row would be other classes
        found = {
            label: self._images(label, points[-1], range(count))
            for label, points in self._at(protocol).items()
        }
        return {label: images for label, images in found.items() if images is not None and count}

    def pictures(self, protocol: Mapping | None) -> list[Pictures]:
        """A few images at every checkpoint, and an image of each class under the protocols of final numbers."""
        made = [] if protocol is None else [self._by_step(protocol)]
        finals = [p for run in self.facts.values() for p in run.points if p["kind"] == "final"]
        made += [self._by_class(protocol) for protocol in protocols(finals)]
        return [pictures for pictures in made if pictures is not None]

    def _by_step(self, protocol: Mapping) -> Pictures | None:
        points = {
            label: found for label, found in self._at(protocol).items() if not self.facts[label].is_base
        }
        steps = sorted({point["step"] for found in points.values() for point in found})
        if len(steps) < 2:
            return None
        drawn = labels_of(protocol, range(protocol["num_samples"]))
        few = list(dict.fromkeys(i * len(self.names) // GROWING for i in range(GROWING)))
        rows = {}
        for index in (drawn.index(label) for label in few if label in drawn):
            for label, found in points.items():
                cells = {point["step"]: self._images(label, point, [index]) for point in found}
                if any(cell is not None for cell in cells.values()):
                    name = self.names.get(drawn[index], f"class {drawn[index]}")
                    rows[f"{label}\n{name}"] = [
                        None if cells.get(step) is None else cells[step][0] for step in steps
                    ]
        if not rows:
            return None
        caption = "The same noise and class at every checkpoint of each run, by the protocol of the results."
        return Pictures(rows, [f"step {step:,}" for step in steps], caption)

    def _by_class(self, protocol: Mapping) -> Pictures | None:
        few = min(CLASSES, len(self.names))
        classes = [i * len(self.names) // few for i in range(few)]
        drawn = labels_of(protocol, range(protocol["num_samples"]))
        indices = [drawn.index(label) for label in classes if label in drawn]
        rows = {
            label: list(images)
            for label, found in self._at(protocol, ("final",)).items()
            if (images := self._images(label, found[-1], indices)) is not None
        }
        if not rows:
            return None
        columns = [self.names.get(drawn[i], f"class {drawn[i]}") for i in indices]
        return Pictures(
            rows,
            columns,
            f"The first image of {few} classes, by the protocol of the final numbers: {describe_protocol(protocol)}",
        )

    def _at(self, protocol: Mapping, kinds: Sequence[str] = MADE_BY) -> dict[str, list[Mapping]]:
        return points_at(self.facts, protocol, kinds)

    def _images(self, label: str, point: Mapping, indices: Sequence[int]) -> np.ndarray | None:
        """Images of a point; None where they were deleted."""
        folder = self.runs[label].path / point["samples"]
        return None if missing_images(folder, indices) else load_images(folder, indices)
