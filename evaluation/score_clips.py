"""Measure how drawn clips move and flicker beside real ones, and how far their features lie from the real ones'."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cache.clips import read_clip
from cache.image_list import Sample, clip_shape, read_samples
from cache.manifest import ids_digest, read_manifest
from cache.reader import FieldReader
from cache.views import UnreadableImage
from common.errors import UserError
from common.sides import Sides
from configs.evaluation import Eval
from configs.schema import Config
from evaluation.image_files import clip_by_clip, watched
from evaluation.sample import clip_settings
from metrics.extractors import ClipExtractor, load_extractors, load_video_classifier
from metrics.features import Extractor
from metrics.quality import named_classes
from metrics.video import MEASURES, compare_clips, measure_motion
from training.ranks import Ranks

# Of clips, (n,) each, their `frames` (n, F, D), and their `features` (n, D) and `labels` where a network gives them.
Measures = dict[str, np.ndarray]


@dataclass
class ClipScorer:
    """Real clips, which are read once, and the networks that see their frames and, if there is one, whole clips."""

    clips: Sequence[Sample]
    source: str  # the name of the list of these clips
    size: Sides
    frame_extractor: Extractor
    extractor: ClipExtractor | None
    _real: Measures = field(default_factory=dict)

    @property
    def identity(self) -> dict:
        """Two results can be compared if this is equal for both."""
        ids = ids_digest([clip.id for clip in self.clips])
        extractor = None if self.extractor is None else self.extractor.identity
        found = {"source": self.source, "clips": len(self.clips), "ids_sha256": ids, "extractor": extractor}
        return found | {"frame_extractor": self.frame_extractor.identity}

    def compare(
        self, folder: Path, indices: Sequence[int], settings: Eval, ranks: Ranks, shown: Sequence[str] = ()
    ) -> dict[str, dict]:
        """{metric: {value, error, real, …}} of the clips `indices` of a folder. A measure that none of them has is left out.

        `shown` are the captions of these clips, which give an accuracy where each names one class of the network for clips.
        """
        own = slice(ranks.rank, None, ranks.world)
        if not self._real:
            real = read_clips(self.clips[own], self.size)
            self._real = self._measure(real, len(self.clips), "real clips", ranks)
        mine = clip_by_clip(folder, list(indices)[own], self.clips[0].frames)
        drawn = self._measure(mine, len(indices), "clips", ranks)
        features = {"drawn_frames": drawn["frames"], "real_frames": self._real["frames"]}
        if self.extractor is not None:
            features |= {"drawn_features": drawn["features"], "real_features": self._real["features"]}
            if shown:
                features["intended"] = named_classes(shown, self.extractor.names)
                features["predicted"] = drawn["labels"]
        of_drawn, of_real = ({name: found[name] for name in MEASURES} for found in (drawn, self._real))
        how = {"bootstrap": settings.bootstrap, "seed": settings.seed}
        found = ranks.on_main(lambda: compare_clips(of_drawn, of_real, **features, **how))
        if ranks.main and (lacking := [name for name, of in found.items() if of["value"] is None]):
            tqdm.write(f"{', '.join(lacking)} left out: no clip has a pixel to measure it by")
        return {name: of for name, of in found.items() if of["value"] is not None}

    def _measure(self, clips: Iterable[np.ndarray], count: int, what: str, ranks: Ranks) -> Measures:
        """The measures of `count` clips, of which this process is given every n-th, in their order."""
        rows = []
        for (clip,) in watched(([clip] for clip in clips), ranks, what, count):
            row = measure_motion(clip) | {"frames": self.frame_extractor.features(clip).pool}  # (F, D)
            if self.extractor is not None:
                found = self.extractor.features(clip[None])
                row |= {"features": found.pool[0], "labels": found.labels[0]}  # (D,), ()
            rows.append(row)
        parts = ranks.gather([rows])
        whole = [parts[i % len(parts)][i // len(parts)] for i in range(count)]
        return {name: np.stack([row[name] for row in whole]) for name in whole[0]}


def load_clip_scorer(config: Config, device: torch.device) -> ClipScorer | None:
    """The scorer of a run of clips, None of a run of images.

    Its real clips are the held-out ones (`eval.csv`), else those of the training; at most as many as are drawn. Raises
    `UserError` where the held-out clips are others than those that the run draws.
    """
    given = clip_settings(config)
    if not given:
        if config.eval.video_extractor is not None:
            raise UserError("eval.video_extractor sees clips, and the run is of images: leave it out")
        return None
    held_out = config.eval.csv is not None
    source, latents = (config.eval if held_out else config.data).csv, config.data.latents
    cached = None if held_out else set(FieldReader(latents, "latents").ids)
    clips = [clip for clip in read_samples(source) if cached is None or clip.id in cached]
    if clip_shape(clips) != tuple(given.values()):
        raise UserError(
            f"{source} does not list clips of {given['frames']} frames at {given['fps']:g} a second, as the run draws them: "
            "list the held-out clips by script 1 with the options of the training clips, or set eval.csv=null"
        )
    size = read_manifest(latents, "latents")["view"]["size"]
    network = config.eval.video_extractor
    extractor = None if network is None else load_video_classifier(network, device)
    # DINOv2, where it is given
    of_frames = load_extractors(config.eval.extractor, device, dinov2=config.eval.dinov2)[-1]
    return ClipScorer(clips[: config.eval.num_samples], source.name, size, of_frames, extractor)


def read_clips(clips: Sequence[Sample], size: Sides) -> Iterator[np.ndarray]:
    """Real clips cut to the crops that the VAE encoded, uint8 `(F, H, W, 3)` one at a time."""
    for clip in clips:
        try:
            yield read_clip(clip.img_path, clip.start, clip.frames, clip.fps, size)
        except UnreadableImage as error:
            raise UserError(f"the real clips are needed once more: {error}") from None
