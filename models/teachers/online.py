"""Compute teacher tokens during training, where there is no token cache: decode the latents, resize, encode."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from common.pretrained import load_pretrained
from common.sides import height_width
from models.latents import LatentCodec
from models.teachers.encoder import TeacherEncoder

ROWS = 8  # images decoded and encoded at a time


class OnlineTeacher(nn.Module):
    """Map clean latents `(B, C, h, w)`, normalised as the network reads them, to L2-normalised teacher tokens `(B, N, D)`.

        codec = LatentCodec(load_decoder("madebyollin/taesd"))
        teacher = OnlineTeacher(codec, load_teacher(name, grid=14))

    The teacher sees the picture that the decoder makes of the whole crop, never the photograph, so that details which the
    VAE loses are missing from the tokens. The decoder is the VAE of the base model or an `AutoencoderTiny`. `bf16` computes in
    that precision, of weights that stay in theirs.
    """

    def __init__(self, codec: LatentCodec, encoder: TeacherEncoder, *, bf16: bool = False):
        super().__init__()
        self.codec, self.encoder, self.bf16 = codec, encoder, bf16

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """A few images at a time: the decoder's activations would outweigh the training's."""
        with torch.autocast(latents.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return torch.cat([self._tokens(part) for part in latents.split(ROWS)])

    def _tokens(self, latents: Tensor) -> Tensor:
        images = self.codec.decode(latents)  # (B, 3, H, W)
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        size = height_width(self.encoder.size)
        if images.shape[-2:] != size:  # bicubic resizing can leave [0, 1]
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(self.encoder(images).float(), dim=-1)  # (B, N, D)


def load_decoder(tiny: str) -> nn.Module:
    """Load the `AutoencoderTiny` of a hub id or folder; raises `UserError` when there is none."""
    return load_pretrained(AutoencoderTiny, tiny, f"teacher.decoder {tiny}").float()
