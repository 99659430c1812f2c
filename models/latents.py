"""Pixels to latents and back: the one place that knows a VAE's posterior and its normalisation."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from method.sampler import filled

# Images decoded at once, and their pixels: the decoder's activations outweigh the denoiser's.
DECODED_ROWS, DECODED_PIXELS = 8, 8 * 512 * 512


class LatentCodec(nn.Module):
    """A VAE and the normalisation of its latents, x_0 = (z − mean) · scaling / std.

    mean, std and scaling are what the VAE's config says (`shift_factor` or `latents_mean`, `latents_std`, `scaling_factor`);
    Stable Diffusion 1.5 only scales. `what` names the VAE in errors. `encode` and `decode` are exact inverses in this
    normalisation. An `AutoencoderTiny` will do where only decoding is asked for.
    """

    def __init__(self, vae: nn.Module, what: str = "vae"):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        self.channels = config.get("latent_channels") or config.z_dim
        self.down, self.frames = pixels_of_cell(vae), frames_of_cell(vae)  # of one cell
        numbers = {"latents_mean": None, "latents_std": None, "shift_factor": None, "scaling_factor": 1.0}
        numbers |= {key: config[key] for key in numbers if key in config}
        buffers = dict(vae.named_buffers(recurse=False))  # where one family keeps them
        numbers |= {key: buffers[key].tolist() for key in numbers if key in buffers}
        for key, value in numbers.items():
            if not _is_normalisation(key, value, self.channels):
                raise UserError(
                    f"{what} has {key} = {value!r:.60}, which is no number to normalise by: mend its config"
                )
        mean = numbers["latents_mean"]
        self.mean = _per_channel(numbers["shift_factor"] if mean is None else mean, 0.0)
        self.std = _per_channel(numbers["latents_std"], 1.0)
        self.scaling = numbers["scaling_factor"]

    @property
    def normalisation(self) -> dict[str, float | list[float]]:
        """What a cache of z itself must know: x_0 = (z − `mean`) · `scaling_factor`, numbers or one a channel; no mean is 0."""
        std = self.std
        scale = (
            self.scaling
            if std == 1.0
            else [self.scaling / s for s in ([std] if isinstance(std, float) else std)]
        )
        return {"scaling_factor": scale} | ({} if self.mean == 0.0 else {"mean": self.mean})

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own z, fp32 `(B, C, h, w)` each, of pixels `(B, 3, H, W)` in [-1, 1]."""
        found = self.vae.encode(pixels)
        if hasattr(found, "latent"):  # of an autoencoder without a posterior
            mean, std = found.latent, torch.zeros_like(found.latent)
        else:
            mean, std = found.latent_dist.mean, found.latent_dist.std
        return self.to_cells(mean).float(), self.to_cells(std).float()

    def to_cells(self, z: Tensor) -> Tensor:
        """The VAE's own z as latents are kept; a family may make patches of it."""
        return z

    def from_cells(self, z: Tensor) -> Tensor:
        """The inverse of `to_cells`."""
        return z

    def normalise(self, z: Tensor) -> Tensor:
        """x_0 of the VAE's own z, both `(B, C, h, w)`."""
        return (z - self._like(self.mean, z)) * self.scaling / self._like(self.std, z)

    def normalise_spread(self, std: Tensor) -> Tensor:
        """A standard deviation of z on the scale of x_0, both `(B, C, h, w)`."""
        return std * self.scaling / self._like(self.std, std)

    def encode(self, pixels: Tensor) -> Tensor:
        """x_0 `(B, C, h, w)`, the mode of the posterior, of pixels `(B, 3, H, W)` in [-1, 1]."""
        return self.normalise(self.posterior(pixels)[0])

    def decode(self, x_0: Tensor) -> Tensor:
        """Pixels `(B, 3, H, W)`, about in [-1, 1], of x_0 `(B, C, h, w)`; in the VAE's own precision."""
        weight = next(self.vae.parameters())
        x_0 = x_0.to(weight.device, weight.dtype)
        z = x_0 * self._like(self.std, x_0) / self.scaling + self._like(self.mean, x_0)  # (B, C, h, w)
        return self.decode_cells(self.from_cells(z))

    def decode_cells(self, z: Tensor) -> Tensor:
        """Pixels of the VAE's own z."""
        return self.vae.decode(z, return_dict=False)[0]

    def _like(self, value: float | list[float], x: Tensor) -> float | Tensor:
        if isinstance(value, float):
            return value
        return torch.tensor(value, device=x.device, dtype=x.dtype).view(1, -1, *[1] * (x.ndim - 2))


def pixels_of_cell(vae: nn.Module) -> int:
    """The pixels on a side of one cell of a VAE's latents."""
    for place, name in ((vae.config, "scale_factor_spatial"), (vae, "spatial_compression_ratio")):
        if getattr(place, name, None) is not None:
            return getattr(place, name)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def frames_of_cell(vae: nn.Module) -> int:
    """The frames that one cell of a video VAE's latents stands for; the first cell is one frame alone. 1 of images."""
    for place, name in (
        (vae.config, "scale_factor_temporal"),
        (vae, "temporal_compression_ratio"),
        (vae.config, "temporal_compression_ratio"),
    ):
        if getattr(place, name, None) is not None:
            return getattr(place, name)
    return 1


@torch.no_grad()
def decode_images(codec: LatentCodec, latents: Tensor, *, rows: int | None = None) -> np.ndarray:
    """Decode x_0 `(B, C, h, w)` to uint8 `(B, H, W, 3)`, or clips to `(B, F, H, W, 3)`, rounded as diffusers does.

    Rounding matters: truncation, as in REPA's sampler, darkens every image by half a level. `rows` images are decoded at a
    time (8 at most, fewer above 512 px), the last time filled up with copies, because kernels sum in another order for another
    number. Values that are not finite would turn into black pixels and a plausible score; they raise `UserError`.
    """
    if latents.ndim not in (4, 5):
        raise ValueError(f"latents must be (B, C, h, w) or (B, C, f, h, w), got {tuple(latents.shape)}")
    pixels = latents[0, 0].numel() * codec.frames * codec.down**2  # of an image or a clip
    rows = rows or max(1, min(DECODED_ROWS, DECODED_PIXELS // pixels))
    decoded = []
    for part in latents.split(rows):
        image = codec.decode(filled(part, rows))[: len(part)].float()  # (b, 3, H, W) in [-1, 1]
        if not torch.isfinite(image).all():
            dtype = next(codec.vae.parameters()).dtype
            what = "the latents are" if not torch.isfinite(part).all() else f"the VAE's {dtype} output is"
            raise UserError(f"{what} not finite: check the run for divergence, decode in bfloat16 or float32")
        image = (image * 0.5 + 0.5).clamp(0, 1).movedim(1, -1).cpu().numpy()  # (b, H, W, 3)
        decoded.append((image * 255).round().astype(np.uint8))
    return np.concatenate(decoded)  # (B, H, W, 3)


def _is_normalisation(key: str, value: object, channels: int) -> bool:
    """Whether a config's number can be used: finite, one or one a channel, absent but for the scale, positive if divided by."""
    if value is None:
        return key != "scaling_factor"
    values = value if isinstance(value, list | tuple) and key.startswith("latents_") else [value]
    sound = all(type(v) in (int, float) and math.isfinite(v) for v in values)
    positive = key in ("shift_factor", "latents_mean") or (sound and min(values, default=0) > 0)
    return sound and positive and len(values) in (1, channels)


def _per_channel(value, default: float) -> float | list[float]:
    """One number for all channels, or a list with one for each."""
    if value is None:
        return default
    return float(value) if isinstance(value, int | float) else [float(v) for v in value]
