"""The normalisation of latents by the VAE's config."""

import pytest
import torch

from cache.dataset import latents_of
from models.families.table import family_of


@pytest.mark.parametrize(
    "normalisation",
    [
        {},
        {"shift_factor": 0.3, "scaling_factor": 0.4},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_a_codec_shifts_and_scales_by_its_config(miniature, normalisation):
    codec_class = type(family_of(str(miniature / "models/sd15-mini")).load_codec())
    vae = family_of(str(miniature / "models/sd15-mini")).load("vae")
    vae.register_to_config(**normalisation)
    codec = codec_class(vae)
    z = torch.randn(2, 4, 3, 3)
    wide = lambda name, default: torch.tensor(normalisation.get(name, default)).view(1, -1, 1, 1)  # noqa: E731
    mean = wide("latents_mean", [normalisation.get("shift_factor", 0.0)])
    expected = (z - mean) * vae.config.scaling_factor / wide("latents_std", [1.0])
    torch.testing.assert_close(codec.normalise(z), expected)
    # A cache of the VAE's own z is normalised when it is read.
    unscaled = {"posterior": "mode", "scaled": False} | codec.normalisation
    torch.testing.assert_close(latents_of(z, unscaled), expected)
    spread = torch.rand(2, 4, 3, 3)
    drawn = latents_of(
        torch.cat([z, spread], 1), unscaled | {"posterior": "moments"}, torch.Generator().manual_seed(1)
    )
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, expected + codec.normalise_spread(spread) * noise)
