"""Held-out images of a config: check them against the training cache, run a network on them with fixed noise, and read its
taps and heads."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cache.dataset import latents_of
from cache.image_list import is_captioned, read_samples
from cache.manifest import check_crops, ids_digest
from cache.reader import FieldReader
from cache.text import TextReader, convert
from common.errors import UserError
from configs.schema import Config
from method.alignment import spatial_norm
from method.objective import squared_error
from method.paths import Path
from method.sampler import initial_noise
from metrics.similarity import mispair, pool_tokens
from metrics.similarity_rows import NUM_IMAGES, Grid
from models.aligned import AlignedModel
from training.parts import build_path, family_for

MIN_IMAGES = 16
LOSS_TIMESTEPS = 8  # noise levels, evenly spread, over which the held-out loss is averaged


@dataclass(frozen=True)
class HeldOut:
    """Images that nothing was trained on, and how many there were to choose from (`available`).

    Latents are (n, C, h, w), teacher tokens (n, N, D), classes (n,), or None of captioned images; the fields of the null
    prompt are (…), and what the network is told of the images (n, 6). Latents of clips are (n, C, f, h, w), and N counts the
    tokens of all f frames.
    """

    latents: np.ndarray
    teacher: np.ndarray
    classes: np.ndarray | None
    null_text: dict[str, Tensor]
    available: int
    images_sha256: str
    teacher_sha256: str
    conditions: dict[str, Tensor] = field(default_factory=dict)


def heldout_images(config: Config, num_images: int | None = None) -> HeldOut:
    """Read the first held-out images of `eval.csv` that both caches hold; its order goes round the classes.

    `num_images` is how many; None takes 1000, or all where there are fewer. Raises `UserError` for images that were trained on,
    too few images, and caches that do not fit the run.
    """
    where = config.eval
    if None in (where.csv, where.latents, where.tokens):
        needed = "eval.csv, eval.latents and eval.tokens, those of an outside teacher (scripts 1–3 on val)"
        raise UserError(f"`align` needs held-out images: set {needed}")
    latents, tokens = FieldReader(where.latents, "latents"), FieldReader(where.tokens, "tokens")
    online = config.teacher.source == "online"
    if online and (made_by := tokens.spec.source.get("model")) != config.teacher.model:
        raise UserError(
            f"{where.tokens} was made by {made_by}, the run's teacher is {config.teacher.model}: run script 3 on the held-out "
            "images with that --teacher"
        )
    pairs = [(latents, config.data.latents), (tokens, config.data.tokens)]
    for held_out, trained in pairs[: 1 if online or config.data.tokens is None else 2]:
        if not held_out.spec.agrees_with(FieldReader(trained, held_out.spec.field).spec):
            raise UserError(
                f"{held_out.folder} and {trained} were made with another model, view or size: run the script on the "
                "held-out images with the options of the training images"
            )
    check_crops(latents.folder, latents.spec.view, tokens.folder, tokens.spec.view)
    frames = latents.spec.shape[1:-2]  # (f,) of clips
    wanted = (prod((*frames, *config.teacher.cells)), config.teacher.dim)
    if (found := tokens.spec.shape) != wanted:
        makes = f"tokens {found}, the run's teacher makes {wanted}"
        raise UserError(f"{where.tokens} holds {makes}: run script 3 with that teacher")
    cached = set(latents.ids) & set(tokens.ids)
    items = [item for item in read_samples(where.csv) if item.id in cached]
    if num_images is not None and num_images > len(items):
        cached = f"the {len(items)} held-out images of {where.csv} that are cached"
        raise UserError(f"--num-images {num_images} are more than {cached}")
    used = items[: NUM_IMAGES if num_images is None else max(num_images, 0)]
    if len(used) < MIN_IMAGES:
        least = f"{MIN_IMAGES} or more are needed, some hundreds are better"
        raise UserError(f"{len(used)} held-out images are too few: {least}")
    ids = [item.id for item in used]
    if trained_on := set(ids) & {item.id for item in read_samples(config.data.csv)}:
        raise UserError(
            f"{where.csv} is not held out: {config.data.csv} has {len(trained_on)} of its images, such as {min(trained_on)}"
        )
    raw, teacher = latents.read_raw(ids), tokens.read(ids).float()
    x_0, told = latents_of(latents.spec.decode(raw), latents.spec.details), latents.spec.size_and_crop(raw)
    classes = None
    if is_captioned(used):
        print(f"{where.csv} has captions and no classes: the linear probe by class is left out")
    else:
        classes = np.array([item.class_id for item in used])
    null = convert(TextReader(config.data.text).null, torch.device("cpu"), torch.float32)
    digests = ids_digest(ids), str(tokens.spec.source.get("weights_sha256"))
    conditions = {} if told is None else dict.fromkeys(family_for(config).image_conditions, told)
    return HeldOut(x_0.numpy(), teacher.numpy(), classes, null, len(items), *digests, conditions)


@dataclass(frozen=True)
class Bench:
    """The inputs that every model is given: held-out images, each with fixed noise, and the null prompt.

    Image i of the list has the noise of seed + i, at every timestep and in any batch. `progress` is called after each batch.
    """

    config: Config
    held: HeldOut
    seed: int
    device: torch.device
    progress: Callable[[], object]

    @cached_property
    def path(self) -> Path:
        return build_path(self.config.diffusion, family_for(self.config), self.held.latents.shape[1:])

    @property
    def teacher_grid(self) -> Grid:
        """The grid of the teacher's tokens."""
        return *self.held.latents.shape[2:-2], *self.config.teacher.cells

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
        """(index of the first image, x_0, noise, text): (b, C, h, w), (b, C, h, w), fields (b, …)."""
        size = self.config.eval.batch_size
        for start in range(0, len(self.held.latents), size):
            x_0 = torch.from_numpy(self.held.latents[start : start + size]).to(self.device)
            noise = initial_noise([self.seed + start + i for i in range(len(x_0))], x_0.shape[1:])
            null = ((name, value.to(self.device)) for name, value in self.held.null_text.items())
            text = {name: value.expand(len(x_0), *value.shape) for name, value in null}
            told = self.held.conditions.items()
            text |= {name: rows[start : start + size].to(self.device) for name, rows in told}
            yield start, x_0, noise.to(self.device), text
            self.progress()

    def heldout_loss(self, model: AlignedModel) -> float:
        """The mean diffusion loss; each image has one of `LOSS_TIMESTEPS` noise levels, the same for every model."""
        levels = self.path.spread(LOSS_TIMESTEPS)
        losses = []
        for start, x_0, noise, text in self.batches():
            t = levels[(start + torch.arange(len(x_0))) % LOSS_TIMESTEPS].to(self.device)  # (b,)
            x_t, target, weight = self.path(x_0, noise, t)
            losses.append(squared_error(model.predict(x_t, t, text), target, weight).cpu())
        return torch.cat(losses).mean().item()


@dataclass(frozen=True)
class HeadTokens:
    """A head's tokens, and how similar they are to the teacher's.

    `pooled` are the tokens averaged over the T cells of `read_taps` (n, T, D). `cosine` is the mean cosine of all images'
    tokens with the teacher's on the teacher's grid, `null_cosine` that with the teacher's tokens of another image.
    """

    pooled: np.ndarray
    cosine: float
    null_cosine: float


def read_taps(
    bench: Bench, model: AlignedModel, heads: Mapping[str, torch.nn.Module], timestep: int
) -> tuple[dict[str, np.ndarray], dict[str, Grid], dict[str, HeadTokens]]:
    """Read all taps in one forward a batch: {tap: features (n, T, C)}, {tap: grid}, and {tap: HeadTokens} for the given heads.

    The grid of T cells is the coarser one, of the tap's own and the teacher's: up-sampled cells hold no new information. Each
    batch is moved to the CPU at once, where the finer side is averaged over these cells.
    """
    teacher, grid, n = bench.held.teacher, bench.teacher_grid, len(bench.held.latents)
    other = mispair(np.arange(n), np.random.default_rng([bench.seed, 8]))  # (n,)
    features, grids, pooled, cosines = {}, {}, {}, {tap: np.empty((2, n)) for tap in heads}
    names = dict.fromkeys([*model.family.measured_taps(model.backbone), *heads])
    with model.reading(names):
        for start, x_0, noise, text in bench.batches():
            rows = slice(start, start + len(x_0))
            t = bench.path.times(torch.full((len(x_0),), timestep, device=x_0.device))  # (b,)
            model.predict(bench.path(x_0, noise, t)[0], t, text, capture=True)
            for tap, feature in model.taps.captured.items():  # (b, C, h, w) or (b, C, f, h, w)
                own = tuple(feature.shape[2:])
                grids[tap] = tuple(map(min, own, grid))
                cells = feature.float().flatten(2).transpose(1, 2).cpu().numpy()  # (b, [f*]h*w, C)
                if not np.isfinite(cells).all():
                    raise UserError(
                        f"features of tap {tap} at timestep {timestep} are not finite: the run has diverged, choose an earlier "
                        "--checkpoint"
                    )
                _put(features, tap, rows, pool_tokens(cells, own, grids[tap]), n)
            for tap, head in heads.items():
                tokens = head(model.taps.captured[tap], grid)  # (b, N, D)
                for place, images in enumerate((np.arange(n)[rows], other[rows])):
                    target = torch.from_numpy(teacher[images]).to(x_0.device)  # (b, N, D)
                    cosine = cosine_similarity(tokens, target_of(bench.config, target), dim=-1)  # (b, N)
                    cosines[tap][place, rows] = cosine.mean(1).cpu().numpy()
                _put(pooled, tap, rows, pool_tokens(tokens.cpu().numpy(), grid, grids[tap]), n)
    means = {tap: [found.mean().item() for found in cosines[tap]] for tap in heads}
    return features, grids, {tap: HeadTokens(pooled[tap], *means[tap]) for tap in heads}


def target_of(config: Config, teacher: Tensor) -> Tensor:
    """The tokens that the heads are trained towards: the teacher's, each frame normalised as the config says."""
    alpha = config.align.spatial_norm
    if alpha is None:
        return teacher
    images = teacher.unflatten(1, (-1, prod(config.teacher.cells)))  # (b, f, N, D)
    return spatial_norm(images, alpha).flatten(1, 2)


def _put(arrays: dict[str, np.ndarray], tap: str, rows: slice, values: np.ndarray, n: int) -> None:
    """Write a batch into the array of its tap. Joining batches at the end instead would need twice the memory."""
    if tap not in arrays:
        arrays[tap] = np.empty((n, *values.shape[1:]), values.dtype)
    arrays[tap][rows] = values
