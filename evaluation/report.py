"""Gather the evaluation results of run folders for the page. Measures nothing and draws no sample."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cache.films import spread_frames, write_film
from cache.text import shown_prompts
from common.errors import UserError
from common.stages import StageEntry
from evaluation.image_files import clips_of, load_images, missing_images
from evaluation.points import points_of
from evaluation.sample import evenly_spread, labels_of
from evaluation.targets import find_baseline, run_labels
from report.assemble import write_report
from report.curves import draw_curves
from report.material import (
    RESULT_KINDS,
    Material,
    Pictures,
    RunFacts,
    Runs,
    last_points,
    points_at,
    protocol_words,
)
from report.records import points_under, protocols, read_alignment
from report.section_alignment import alignment_figures
from training.run_folder import RunFolder

Names = Sequence[str]
GRID_ROWS, GRID_COLUMNS = 6, 10
CLASSES, GROWING = 8, 3  # of which one image is shown: by final numbers, and at every checkpoint
FILM_SIDE = 256  # px
MIDDLE = " Of each clip the middle frame."


def make_report(
    page: Path,
    runs: Sequence[RunFolder],
    *,
    baseline: Path | None,
    times: Sequence[StageEntry],
    command: str,
    note: str | None = None,
) -> Path:
    """Write the page about these runs, `note` at its top, and its figures to PAGE_figures/; returns its path."""
    labelled = dict(zip(run_labels(runs), runs, strict=True))
    facts = {label: facts_of(run) for label, run in labelled.items()}
    if not any(run.points or run.alignment for run in facts.values()):
        raise UserError(
            f"nothing was measured of {', '.join(str(run.path) for run in runs)}: run `curve`, `final` or `align` first"
        )
    folder = page.with_name(f"{page.stem}_figures")
    compared, protocol = find_baseline(labelled, baseline), shared_protocol(facts)
    curve, figures = None, []
    if protocol is not None:
        curves = {label: points_under(run.points, protocol, RESULT_KINDS) for label, run in facts.items()}
        base_models = [label for label, run in facts.items() if run.is_base]
        curve = draw_curves(folder, curves, compared, base_models)
        figures = [folder / name for name in ("curve.png", "curve_all.png")]
    names = shown_prompts(runs[0].config.data.text)
    clips = drawn_clips(facts, protocol, names)
    material = Material(
        runs=facts, baseline=compared, curve=curve, times=times, command=command, note=note, folder=folder,
        curve_figures=[path for path in figures if path.exists()],
        grids=sample_grids(facts, protocol, names),
        grid_columns=[names[i] for i in range(min(GRID_COLUMNS, len(names)))],
        pictures=[
            *frames_of(clips), *pictures_by_step(facts, protocol, names), *pictures_by_class(facts, names),
        ],
        films=write_films(folder, clips, protocol),
    )  # fmt: skip
    return write_report(page, material)


def facts_of(run: RunFolder) -> RunFacts:
    """Read the records of a run folder."""
    folder = run.path / "eval"
    alignment = read_alignment(folder) if (folder / "align.json").exists() else None
    return RunFacts(
        folder=run.path, is_base=run.is_base_model, settings=run.settings(), commands=run.commands(),
        log=run.metrics(), points=points_of(run), alignment=alignment, figures=alignment_figures(folder),
    )  # fmt: skip


def shared_protocol(facts: Runs) -> Mapping | None:
    """The protocol of curves that most runs share; of equals the one with most points, then the one with most images."""
    points = [point for run in facts.values() for point in run.points if point["kind"] in RESULT_KINDS]

    def rank(protocol: Mapping) -> tuple[int, int, int]:
        found = points_at(facts, protocol)
        return len(found), sum(map(len, found.values())), protocol["num_samples"]

    return max(protocols(points), key=rank, default=None)


def sample_grids(runs: Runs, protocol: Mapping | None, names: Names) -> dict[str, np.ndarray]:
    """The first images of each run at its last step under a protocol; none where classes are random."""
    if protocol is None or protocol["labels"] != "balanced" or "frames" in protocol:
        return {}
    columns = min(GRID_COLUMNS, len(names))
    # Image i shows class i: where not all classes have a column, a second row would be other classes.
    most = GRID_ROWS if len(names) == columns else 1
    indices = range(min(most, protocol["num_samples"] // columns) * columns)
    points = last_points(runs, protocol)
    found = {label: images_of(runs[label], point, indices) for label, point in points.items()}
    return {label: images for label, images in found.items() if images is not None}


def drawn_clips(runs: Runs, protocol: Mapping | None, names: Names) -> dict[str, np.ndarray]:
    """A clip (F, H, W, 3) of each of a few prompts and of each run at its last step under a protocol; none of images."""
    if protocol is None or "frames" not in protocol:
        return {}
    points, clips = last_points(runs, protocol), {}
    for shown, index in few_drawn(protocol, GROWING).items():
        for label, point in points.items():
            found = clips_at(runs[label], point, [index])
            if found is not None:
                clips[f"{label}\n{names[shown]}"] = found[0]
    return clips


def frames_of(clips: Mapping[str, np.ndarray]) -> Iterator[Pictures]:
    """A row of frames of each clip."""
    if clips:
        shown = spread_frames(len(next(iter(clips.values()))), CLASSES)
        rows = {title: list(clip[shown]) for title, clip in clips.items()}
        columns = [f"frame {number + 1}" for number in shown]
        yield Pictures(rows, columns, "Frames of the same clips, without compression.")


def write_films(folder: Path, clips: Mapping[str, np.ndarray], protocol: Mapping | None) -> dict[str, Path]:
    """Write the clips as films no larger than a page needs; returns their file paths by title."""
    films = {}
    for number, (title, clip) in enumerate(clips.items()):
        scale = FILM_SIDE / max(clip.shape[1:3])
        if scale < 1:
            size = tuple(round(side * scale) for side in (clip.shape[2], clip.shape[1]))
            frames = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in clip)
            clip = np.stack(list(map(np.asarray, frames)))
        folder.mkdir(parents=True, exist_ok=True)
        films[title] = folder / f"film_{number}.mp4"
        write_film(films[title], clip, protocol["fps"])
    return films


def few_drawn(protocol: Mapping, few: int) -> dict[int, int]:
    """{class: index of its first sample} of `few` of the classes that were drawn, evenly spread, or of all."""
    drawn = labels_of(protocol, range(protocol["num_samples"]))
    labels = sorted(set(drawn))
    return {labels[i]: drawn.index(labels[i]) for i in evenly_spread(len(labels), few)}


def pictures_by_step(runs: Runs, protocol: Mapping | None, names: Names) -> Iterator[Pictures]:
    """A few images at every checkpoint."""
    trained = {label: run for label, run in runs.items() if not run.is_base}
    points = {} if protocol is None else points_at(trained, protocol)
    steps = sorted({point["step"] for found in points.values() for point in found})
    if len(steps) < 2:
        return
    rows = {}
    for shown, index in few_drawn(protocol, GROWING).items():
        for label, found in points.items():
            images = {p["step"]: images_of(runs[label], p, [index]) for p in found}
            cells = {step: image[0] for step, image in images.items() if image is not None}
            if cells:
                rows[f"{label}\n{names[shown]}"] = [cells.get(step) for step in steps]
    if rows:
        caption = "The same noise and class at every checkpoint of each run, by the protocol of the results."
        caption += MIDDLE if "frames" in protocol else ""
        yield Pictures(rows, [f"step {step:,}" for step in steps], caption)


def pictures_by_class(runs: Runs, names: Names) -> Iterator[Pictures]:
    """An image of each of a few classes, under each protocol of final numbers."""
    for protocol in protocols([p for run in runs.values() for p in run.points if p["kind"] == "final"]):
        shown = few_drawn(protocol, CLASSES)
        indices, points = [*shown.values()], last_points(runs, protocol, ("final",))
        found = {label: images_of(runs[label], point, indices) for label, point in points.items()}
        if rows := {label: list(images) for label, images in found.items() if images is not None}:
            caption = f"The first image of {len(shown)} classes, by the protocol of the final numbers: "
            columns = [names[label] for label in shown]
            yield Pictures(
                rows, columns, caption + protocol_words(protocol) + (MIDDLE if "frames" in protocol else "")
            )


def images_of(run: RunFacts, point: Mapping, indices: Sequence[int]) -> np.ndarray | None:
    """Images of a point, or the middle frames of clips; None where there are none, or where they were deleted."""
    if "frames" in point["protocol"]:
        clips = clips_at(run, point, indices)
        return None if clips is None else clips[:, clips.shape[1] // 2]
    return _load(run, point, indices)


def clips_at(run: RunFacts, point: Mapping, indices: Sequence[int]) -> np.ndarray | None:
    """Clips (n, F, H, W, 3) of a point; None as in `images_of`."""
    strips = _load(run, point, indices)
    return None if strips is None else clips_of(strips, point["protocol"]["frames"])


def _load(run: RunFacts, point: Mapping, indices: Sequence[int]) -> np.ndarray | None:
    folder = run.folder / point["samples"]
    return load_images(folder, indices) if indices and not missing_images(folder, indices) else None
