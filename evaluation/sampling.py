"""From text embeddings to PNG files: DDIM sampling in which an image depends on its own seed alone."""

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from errors import UserError
from files import write_atomically

# How much noise there is at a DDPM index, on REPA's scale: 0 = data, 1 = noise. On REPA's linear path
# x_t = (1 - t) x0 + t ε the ratio sigma / alpha is t / (1 - t); "snr" inverts that for SD's schedule.
NOISE_LEVELS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "snr": lambda abar, t: (1 - abar[t]).sqrt() / ((1 - abar[t]).sqrt() + abar[t].sqrt()),
    "index": lambda abar, t: t / len(abar),
}


def balanced_labels(n: int, num_classes: int) -> list[int]:
    """Label i is i mod `num_classes`: balanced and interleaved.

    Interleaved, because the Inception score splits files in their order: class-sorted files read 62 where
    the same images in another order read 298.
    """
    if n < 1 or num_classes < 1:
        raise ValueError(f"n and num_classes must be positive, got {n} and {num_classes}")
    return [i % num_classes for i in range(n)]


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, one generator per image.

    A CPU generator per seed gives the same numbers on every machine, and the same image whatever batch it
    is in.
    """
    if not seeds:
        raise ValueError("no seeds")
    draws = [torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(int(s))) for s in seeds]
    return torch.stack(draws)  # (B, C, h, w)


def guided_steps(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, *, high: float, space: str = "snr"
) -> list[bool]:
    """At which of `timesteps` (DDPM indices) guidance acts: where the noise level is at most `high`.

    The level runs from 0 (data) to 1 (noise) as in REPA, so `high` = 0.7 switches guidance off at the noisy
    end. `space` says how SD's schedule is put on that scale: "snr" (equal noise, index 605 for 0.7) or
    "index" (the fraction of the index, 700).
    """
    if not 0.0 <= high <= 1.0:
        raise ValueError(f"guidance_high must be in [0, 1], got {high}")
    if space not in NOISE_LEVELS:
        raise ValueError(f"guidance_space must be one of {sorted(NOISE_LEVELS)}, got {space!r}")
    levels = NOISE_LEVELS[space](alphas_cumprod.double().cpu(), timesteps.cpu().long())  # (steps,)
    return (levels <= high).tolist()


@torch.no_grad()
def sample_latents(
    unet: torch.nn.Module,
    scheduler,
    text: torch.Tensor,
    null_text: torch.Tensor,
    seeds: Sequence[int],
    *,
    shape: Sequence[int],
    steps: int,
    cfg: float,
    guidance_high: float = 1.0,
    guidance_space: str = "snr",
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Sample latents with DDIM (eta 0), as `StableDiffusionPipeline` would from the same noise.

    `text` (B, L, D) and `null_text` (L, D) are caption embeddings; device and dtype are those of `text`.
    `seeds` holds one integer per image, `shape` is (C, h, w), `steps` the number of denoising steps, `cfg`
    >= 1 the guidance scale as in diffusers. Guidance costs one forward of 2B; where it does not act (`cfg`
    1, or a noise level above `guidance_high`, see `guided_steps`) the unconditional half is not computed at
    all. `progress(done, steps)` is called after each step. Returns (B, C, h, w). The scheduler handed in is
    not changed, nor is the U-Net's mode.
    """
    from diffusers import DDIMScheduler

    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"only DDIM draws no noise between steps, got {type(scheduler).__name__}")
    if text.ndim != 3 or tuple(null_text.shape) != tuple(text.shape[1:]):
        raise ValueError(
            f"text {tuple(text.shape)} must be (B, L, D), null_text {tuple(null_text.shape)} (L, D)"
        )
    if len(seeds) != len(text):
        raise ValueError(f"{len(seeds)} seeds for {len(text)} captions")
    if len(shape) != 3:
        raise ValueError(f"shape must be (C, h, w), got {tuple(shape)}")
    if steps < 1 or cfg < 1:
        raise ValueError(f"steps and cfg must be at least 1, got {steps} and {cfg}")

    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=text.device)
    guided = [False] * len(scheduler.timesteps)
    if cfg > 1:
        guided = guided_steps(
            scheduler.alphas_cumprod, scheduler.timesteps, high=guidance_high, space=guidance_space
        )
    null = null_text.to(text).expand_as(text)  # (B, L, D)
    both = torch.cat([null, text])  # (2B, L, D)
    x = initial_noise(seeds, shape).to(text.device, text.dtype) * scheduler.init_noise_sigma  # (B, C, h, w)
    for done, (t, guide) in enumerate(zip(scheduler.timesteps, guided, strict=True), start=1):
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guide else x, t)  # (B or 2B, C, h, w)
        out = unet(x_in, t, encoder_hidden_states=both if guide else text, return_dict=False)[0]
        if guide:
            uncond, cond = out.chunk(2)  # (B, C, h, w) each
            out = uncond + cfg * (cond - uncond)
        x = scheduler.step(out, t, x, eta=0.0, return_dict=False)[0]  # (B, C, h, w)
        if progress is not None:
            progress(done, steps)
    return x


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: torch.Tensor, *, batch_size: int = 8) -> np.ndarray:
    """Decode (B, C, h, w) latents to (B, H, W, 3) uint8, rounded as diffusers' image processor does.

    Rounding matters: truncation, as in REPA's sampler, darkens every image by half a level. At most
    `batch_size` images are decoded at once, since the decoder's activations at 512 px outweigh the U-Net's.
    Values that are not finite would turn into black pixels and a plausible score; they are a `UserError`.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents must be (B, C, h, w), got {tuple(latents.shape)}")
    weight = next(vae.parameters())
    decoded = []
    for part in latents.split(batch_size):
        z = part.to(weight.device, weight.dtype) / vae.config.scaling_factor  # (b, C, h, w)
        image = vae.decode(z, return_dict=False)[0].float()  # (b, 3, H, W) in [-1, 1]
        if not torch.isfinite(image).all():
            source = (
                "the latents are" if not torch.isfinite(part).all() else f"the VAE's {weight.dtype} output is"
            )
            raise UserError(
                f"{source} not finite: check the run for divergence, decode in bfloat16 or float32"
            )
        image = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()  # (b, H, W, 3)
        decoded.append((image * 255).round().astype(np.uint8))
    return np.concatenate(decoded)  # (B, H, W, 3)


def image_path(folder: str | Path, index: int) -> Path:
    """Where image `index` of a sample folder lies."""
    return Path(folder) / f"{index:06d}.png"


def save_images(images: np.ndarray, folder: str | Path, names: Sequence[int] | None = None) -> list[Path]:
    """Write (N, H, W, 3) uint8 images as `{index:06d}.png`, each atomically; `names` are the indices."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    indices = range(len(images)) if names is None else names
    if len(indices) != len(images):
        raise ValueError(f"{len(indices)} names for {len(images)} images")
    paths = [image_path(folder, int(i)) for i in indices]
    for image, path in zip(images, paths, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomically(path, buffer.getvalue())
    return paths


def load_images(folder: str | Path, n: int, *, start: int = 0) -> np.ndarray:
    """Read images `start` .. `start + n - 1` of a folder written by `save_images` as (n, H, W, 3) uint8.

    Fewer than asked for is a `UserError`, never a shorter mean; so are unreadable files and mixed sizes.
    `start` lets a caller walk through 10k images of 512 px without holding 8 GB.
    """
    if n < 1 or start < 0:
        raise ValueError(f"n must be positive and start not negative, got {n} and {start}")
    paths = [image_path(folder, i) for i in range(start, start + n)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} holds {n - len(missing)} of the {n} images asked for (first missing: "
            f"{missing[0].name}); sample them first, or ask for fewer"
        )
    images = [_read_rgb(path) for path in paths]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise UserError(f"{folder} mixes image sizes {sorted(sizes)}; sample into an empty folder")
    return np.stack(images)  # (n, H, W, 3)


def _read_rgb(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise UserError(f"{path} is a {image.mode} image, RGB is wanted")
            return np.asarray(image)
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error}); delete it and sample again") from None
