"""The small models of the moving digits: the classes of LTX-Video in small sizes, a teacher of frames, and two judges.

As in `models.py`, a `train_*` function returns a model in eval mode. Digits are `(N, 1, 8, 8)` in [0, 1]; what a model sees is
drawn of them by `moving.py`, frames at random places or whole clips.
"""

from collections.abc import Sequence

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from miniature import models as small
from miniature.moving import FRAMES, MOTIONS, SIDE, WAY, draw, draw_clips
from miniature.tokenizers import t5_tokenizer
from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD

CHANNELS, TEXT = 16, 32  # of the latents; width of the text
KL_WEIGHT = 1e-6
LENGTH = 128  # tokens of a prompt, as LTXPipeline has them
WORDINGS = ("a {} {}", "the {} {}", "{} {}", "a video of a {} {}", "a digit {} {}")


def some_clips(digits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, F, H, W) in [-1, 1] of the digits of these numbers, in random motions, and the motions (B,)."""
    motions = torch.randint(len(MOTIONS), (len(index),))
    return 2 * draw_clips(digits[index], motions) - 1, motions


def some_frames(digits: Tensor, index: Tensor) -> Tensor:
    """Frames (B, 3, H, W) in [0, 1] of digits anywhere on the cross of all ways."""
    motions = torch.randint(len(MOTIONS), (len(index),))
    ways = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motions]  # (B, 2)
    places = ways * WAY * (2 * torch.rand(len(index), 1) - 1)
    return draw(digits[index], places).expand(-1, 3, -1, -1)


def train_vae(digits: Tensor, steps: int) -> diffusers.AutoencoderKLLTXVideo:
    """Train LTX-Video's autoencoder: 13 frames of 32 px become 16 × 4 × 4 × 4, of mean 0 and deviation 1 in each channel."""
    widths, layers, scaled = (16, 32), (1, 1, 1), (True, True)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=CHANNELS, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers,
        down_block_types=("LTXVideoDownBlock3D",) * 2, downsample_type=("conv",) * 2,
        decoder_layers_per_block=layers, spatio_temporal_scaling=scaled, decoder_spatio_temporal_scaling=scaled,
        decoder_inject_noise=(False,) * 3, upsample_residual=(False,) * 2, upsample_factor=(1,) * 2, patch_size=2,
    )  # fmt: skip

    def loss(index: Tensor) -> Tensor:
        x, _ = some_clips(digits, index)  # (B, 3, F, H, W)
        latent = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(latent.sample()).sample, x) + KL_WEIGHT * latent.kl().mean()

    small.fit("vae", vae.parameters(), loss, len(digits), steps, batch=4, peak_lr=8e-3)
    vae.eval()
    clips = all_clips(digits[:: max(1, len(digits) // 200)])
    latents = encode(vae, clips).transpose(0, 1).flatten(1)  # (C, …)
    vae.latents_mean.copy_(latents.mean(1))
    vae.latents_std.copy_(latents.std(1))
    return vae


def all_clips(digits: Tensor) -> Tensor:
    """Clips in [0, 1] of all digits in all motions."""
    motions = torch.arange(len(MOTIONS)).repeat_interleave(len(digits))
    return draw_clips(digits.repeat(len(MOTIONS), 1, 1, 1), motions)


@torch.no_grad()
def encode(vae: diffusers.AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    """The modes (N, C, f, h, w) of clips in [0, 1]."""
    return torch.cat([vae.encode(2 * x - 1).latent_dist.mode() for x in clips.split(32)])


@torch.no_grad()
def measure_vae(vae: diffusers.AutoencoderKLLTXVideo, digits: Tensor) -> dict[str, float]:
    """The PSNR in dB of reconstructed clips, and of the worst frame; and 1 / (1 + flicker), which is 1 where nothing flickers.

    Flicker is the mean change of pixels that stay black from one frame to the next, in grey levels of 255.
    """
    clips = all_clips(digits)
    decoded = torch.cat([vae.decode(z).sample for z in encode(vae, clips).split(32)])
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    errors = (decoded - clips).square().mean((0, 1, 3, 4))  # (F,)
    still = (clips.amax((1, 2), keepdim=True) < 1 / 255).expand_as(clips[:, :, 1:])
    flicker = 255 * decoded.diff(dim=2).abs()[still].mean()
    return {
        "vae_psnr_db": -10 * errors.mean().log10().item(),
        "vae_worst_frame_psnr_db": -10 * errors.max().log10().item(),
        "vae_stillness": 1 / (1 + flicker.item()),
    }


def build_tokenizer(names: Sequence[str]) -> transformers.T5TokenizerFast:
    """T5's tokenizer, to which each word of the captions is one token."""
    words = " ".join([*names, *MOTIONS, *WORDINGS]).replace("{}", "").split()
    return t5_tokenizer(LENGTH, list(dict.fromkeys(words)))


def tokenize(tokenizer: transformers.T5TokenizerFast, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Ids and mask (N, 128), as LTXPipeline makes them."""
    found = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    most = int(found.attention_mask.sum(1).max())  # what is behind is masked
    return {"input_ids": found.input_ids[:, :most], "attention_mask": found.attention_mask[:, :most]}


def captions(names: Sequence[str], wording: str = WORDINGS[0]) -> list[str]:
    """The captions of every digit in every motion, and the empty one."""
    return [wording.format(name, motion) for name in names for motion in MOTIONS] + [""]


def train_text_encoder(tokenizer, names: Sequence[str], steps: int) -> transformers.T5EncoderModel:
    """Train a small T5 encoder by a contrastive loss (InfoNCE) between the mean tokens of two wordings of each caption."""
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    encoder = transformers.T5EncoderModel(config)
    worded = [tokenize(tokenizer, captions(names, wording)) for wording in WORDINGS]
    count = len(captions(names))

    def loss(_: Tensor) -> Tensor:
        one, other = torch.randperm(len(WORDINGS))[:2].tolist()
        a, b = (F.normalize(pooled(encoder, worded[w]), dim=-1) for w in (one, other))  # (K, 32)
        return F.cross_entropy(a @ b.mT / 0.1, torch.arange(count))

    small.fit("text", encoder.parameters(), loss, count, steps, batch=1, peak_lr=3e-3)
    return encoder.eval()


def pooled(encoder: transformers.T5EncoderModel, ids: dict[str, Tensor]) -> Tensor:
    """The mean token (N, D) of each prompt."""
    mask = ids["attention_mask"].unsqueeze(-1)
    return (encoder(**ids).last_hidden_state * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def measure_caption_cosine(tokenizer, encoder, names: Sequence[str]) -> float:
    """The largest cosine between the mean tokens of two captions."""
    unit = F.normalize(pooled(encoder, tokenize(tokenizer, captions(names))), dim=-1)
    return (unit @ unit.mT - 2 * torch.eye(len(unit))).max().item()


def build_network() -> diffusers.LTXVideoTransformer3DModel:
    """An untrained network of LTX-Video, whose blocks and output start from zero, as those of DiT do."""
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96,
        num_layers=6, caption_channels=TEXT,
    )  # fmt: skip
    for layer in (network.time_embed.linear, network.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for table in (
        network.scale_shift_table,
        *(block.scale_shift_table for block in network.transformer_blocks),
    ):
        nn.init.zeros_(table)
    return network


def train_teacher(digits: Tensor, labels: Tensor, steps: int) -> transformers.Dinov2Model:
    """Train a small DINOv2 on frames, to predict the class from the mean token and the pixels of its patch from each token."""
    teacher = small.build_teacher()
    classify, paint = nn.Linear(64, 10), nn.Linear(64, small.PATCH**2)
    teacher.train()

    def loss(index: Tensor) -> Tensor:
        frames = some_frames(digits, index)
        patches = F.unfold(2 * frames[:, :1] - 1, small.PATCH, stride=small.PATCH).mT  # (B, 16, 64)
        masked = torch.rand(len(index), 16) < 0.1
        x = small.normalise(frames, IMAGENET_MEAN, IMAGENET_STD)
        tokens = teacher(x, bool_masked_pos=masked).last_hidden_state[:, 1:]  # (B, 16, 64)
        class_loss = F.cross_entropy(classify(tokens.mean(1)), labels[index])
        return class_loss + small.PIXEL_WEIGHT * F.mse_loss(paint(tokens), patches)

    parameters = [*teacher.parameters(), *classify.parameters(), *paint.parameters()]
    small.fit("teacher", parameters, loss, len(digits), steps, batch=64, peak_lr=5e-3, weight_decay=0.05)
    return teacher.eval()


def train_digit_judge(digits: Tensor, labels: Tensor, names: list[str], steps: int):
    """Train a small ResNet on frames, to judge which digit they show."""
    classifier = small.build_classifier(names)
    classifier.train()

    def loss(index: Tensor) -> Tensor:
        x = small.normalise(some_frames(digits, index), small.CLASSIFIER_MEAN, small.CLASSIFIER_STD)
        return F.cross_entropy(classifier(x + 0.1 * torch.randn_like(x)).logits, labels[index])

    small.fit(
        "classifier",
        classifier.parameters(),
        loss,
        len(digits),
        steps,
        batch=64,
        peak_lr=4e-3,
        weight_decay=0.01,
    )
    return classifier.eval()


def train_motion_judge(digits: Tensor, steps: int) -> transformers.VideoMAEForVideoClassification:
    """Train a small VideoMAE on whole clips, to judge which motion they show."""
    names = list(MOTIONS)
    config = transformers.VideoMAEConfig(
        image_size=SIDE, patch_size=8, num_frames=FRAMES, tubelet_size=FRAMES, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    classifier = transformers.VideoMAEForVideoClassification(config)
    classifier.train()

    def loss(index: Tensor) -> Tensor:
        x, motions = some_clips(digits, index)
        x = x.transpose(1, 2)  # (B, F, 3, H, W)
        return F.cross_entropy(classifier(x + 0.1 * torch.randn_like(x)).logits, motions)

    small.fit("motion", classifier.parameters(), loss, len(digits), steps, batch=16, peak_lr=3e-3)
    return classifier.eval()


@torch.no_grad()
def measure_motion_accuracy(judge: transformers.VideoMAEForVideoClassification, digits: Tensor) -> float:
    """The share of clips, of all digits in all motions, whose motion is judged rightly."""
    x, motions = 2 * all_clips(digits) - 1, torch.arange(len(MOTIONS)).repeat_interleave(len(digits))
    return (judge(x.transpose(1, 2)).logits.argmax(1) == motions).float().mean().item()
