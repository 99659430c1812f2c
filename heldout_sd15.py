"""The held-out images of a config, checked against the training cache; and forwards on them with noise that never changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from build_sd15 import build_loss
from configs.schema import Config
from dataset_sd15 import latents_of
from errors import UserError
from evaluation.alignment_rows import NUM_IMAGES
from evaluation.sampling import initial_noise
from loss_sd15 import SD15Loss
from models.diffusion import add_noise
from models.sd15_unet_aligned import SD15UNetAligned
from preprocessing.manifest import read_table
from preprocessing.reader import FieldReader
from preprocessing.samples import read_samples

MIN_IMAGES = 16
LOSS_TIMESTEPS = 8  # noise levels, evenly spread, over which the held-out loss is averaged


@dataclass(frozen=True)
class HeldOut:
    """Images that nothing was trained on: latents (n, 4, h, w), teacher tokens (n, N, D), classes (n,), the null prompt (L, C),
    and how many images there were to choose from."""

    latents: np.ndarray
    teacher: np.ndarray
    classes: np.ndarray
    null_text: Tensor
    available: int


def heldout_images(config: Config, num_images: int | None = None) -> HeldOut:
    """The first held-out images of `eval.csv` that both caches hold, in its order, which goes round the classes."""
    where = config.eval
    if None in (where.csv, where.latents, where.tokens):
        raise UserError(
            "`align` needs held-out images: set eval.csv, eval.latents and eval.tokens (scripts 1–3 on val)"
        )
    latents, tokens = FieldReader(where.latents, "latents"), FieldReader(where.tokens, "tokens")
    online = config.teacher.source == "online"
    if online and (made_by := tokens.spec.source.get("model")) != config.teacher.model:
        raise UserError(
            f"{where.tokens} was made by {made_by}, the run's teacher is {config.teacher.model}: run script 3 on the held-out "
            "images with that --teacher"
        )
    for held_out, trained in ((latents, config.data.latents), (tokens, config.data.tokens)):
        if online and held_out is tokens:
            continue
        if not held_out.spec.agrees_with(FieldReader(trained, held_out.spec.field).spec):
            raise UserError(
                f"{held_out.folder} and {trained} were made with another model, view or size: run the script on the "
                "held-out images with the options of the training images"
            )
    wanted = (config.teacher.grid**2, config.teacher.dim)
    if tokens.spec.shape != wanted:
        raise UserError(
            f"{where.tokens} holds tokens {tokens.spec.shape}, the run's teacher makes {wanted}: run script 3 with that teacher"
        )
    cached = set(latents.ids) & set(tokens.ids)
    samples = [sample for sample in read_samples(where.csv) if sample.id in cached]
    if num_images is not None and num_images > len(samples):
        raise UserError(
            f"--num-images {num_images} are more than the {len(samples)} held-out images of {where.csv} that are cached"
        )
    chosen = samples[: NUM_IMAGES if num_images is None else max(num_images, 0)]
    if len(chosen) < MIN_IMAGES:
        raise UserError(
            f"{len(chosen)} held-out images are too few: {MIN_IMAGES} or more are needed, some hundreds are better"
        )
    ids = [sample.id for sample in chosen]
    return HeldOut(
        latents_of(latents.read(ids), latents.spec.details).numpy(),
        tokens.read(ids).float().numpy(),
        np.array([sample.class_id for sample in chosen]),
        read_table(config.data.text)[0][-1].float(),
        len(samples),
    )


@dataclass(frozen=True)
class Bench:
    """What every model meets alike: held-out images, each with noise that never changes, and the null prompt.

    Image i of the list has the noise of seed + i, at every timestep and in any batch. `progress` counts batches.
    """

    config: Config
    held: HeldOut
    seed: int
    device: torch.device
    progress: Callable[[], object]

    @cached_property
    def loss(self) -> SD15Loss:
        return build_loss(self.config)

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(index of the first image, x_0, noise, text): (b, 4, h, w), (b, 4, h, w), (b, L, C)."""
        size = self.config.eval.batch_size
        for start in range(0, len(self.held.latents), size):
            x_0 = torch.from_numpy(self.held.latents[start : start + size]).to(self.device)
            noise = initial_noise([self.seed + start + i for i in range(len(x_0))], x_0.shape[1:])
            text = self.held.null_text.to(self.device).expand(len(x_0), -1, -1)
            yield start, x_0, noise.to(self.device), text
            self.progress()

    def predict(
        self, model: SD15UNetAligned, x_0: Tensor, noise: Tensor, text: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The network's output (b, 4, h, w) at timesteps (b,)."""
        noisy = add_noise(x_0, noise, *self.loss.schedule.at(timesteps))
        return model(noisy, timesteps, text, capture=False)

    def heldout_loss(self, model: SD15UNetAligned) -> float:
        """The diffusion loss, each image at one of `LOSS_TIMESTEPS` noise levels, the same one for every model."""
        levels = torch.linspace(0, self.loss.schedule.num_steps - 1, LOSS_TIMESTEPS + 2)[1:-1].long()
        losses = []
        for start, x_0, noise, text in self.batches():
            t = levels[(start + torch.arange(len(x_0))) % LOSS_TIMESTEPS].to(self.device)  # (b,)
            output = self.predict(model, x_0, noise, text, t)
            losses.append(self.loss.diffusion_error(output, x_0, noise, t).cpu())
        return torch.cat(losses).mean().item()
