"""Measure on held-out images how much of the teacher's geometry a run's mid-block holds."""

import numpy as np
import torch

from build_sd15 import build_loss
from configs.schema import Config
from dataset_sd15 import latents_of
from errors import UserError
from evaluation.alignment_metrics import (
    cknna,
    heldout_cca,
    joint_tsne,
    paired_cosine,
    pool_tokens,
    ridge_project,
)
from evaluation.plots import TsnePanel
from evaluation.sampling import initial_noise
from models.alignment import spatial_norm
from models.diffusion import add_noise
from models.sd15_unet_aligned import SD15UNetAligned, sd15_taps
from models.taps import Taps
from preprocessing.manifest import read_table
from preprocessing.reader import FieldReader
from preprocessing.samples import read_samples

MAX_IMAGES = 1000  # held-out images: 1.6 GB of tokens and features at full size
TSNE_TOKENS = 400  # a side
LOSS_TIMESTEPS = 8  # noise levels, evenly spread, over which the held-out loss is averaged
SOURCES = {"head": "head's tokens", "ridge": "ridge map of mid-block"}


@torch.no_grad()
def measure_alignment(
    config: Config, model: SD15UNetAligned, *, timestep: int, seed: int, device: torch.device
):
    """Numbers and t-SNE panels of one model at one timestep, on the images of `eval.csv`.

    Returns a dict for JSON, and {source: TsnePanel}: the head's tokens where the run has a head, and for every run the ridge
    map of its mid-block features to the teacher's tokens, fitted on half of the images and shown on the other half, so that a
    run without a head can be seen beside one that has it.
    """
    latents, teacher, classes, null_text = _heldout(config)
    features, head_tokens, heldout_loss = _read_mid_block(
        config, model, latents, null_text, timestep=timestep, seed=seed, device=device
    )
    n, channels, h, w = features.shape
    if max(h, w) > config.teacher.grid:
        raise UserError(
            f"the mid-block's grid {h} × {w} is finer than the teacher's {config.teacher.grid}: cache more tokens"
        )
    native = features.reshape(n, channels, h * w).transpose(
        0, 2, 1
    )  # (n, h·w, C): up-sampled cells add no samples
    pooled = pool_tokens(teacher, (config.teacher.grid,) * 2, (h, w))  # (n, h·w, D)
    k = min(64, native.shape[-1] // 2, pooled.shape[-1] // 2, n * h * w // 8)
    alpha = config.align.spatial_norm
    target = (
        teacher if alpha is None else spatial_norm(torch.from_numpy(teacher), alpha).numpy()
    )  # the head's own
    result = {
        "timestep": timestep,
        "seed": seed,
        "num_images": n,
        "mid_block_grid": [h, w],
        "cca": heldout_cca(native, pooled, k=k, seed=seed),
        "cknna": cknna(native.mean(1), pooled.mean(1), seed=seed),
        "heldout_loss_diff": heldout_loss,
        "head_cosine": None if head_tokens is None else paired_cosine(head_tokens, target),
    }
    projected, test = ridge_project(native, pooled, seed=seed)
    panels = {SOURCES["ridge"]: _panel(projected, pooled[test], classes[test], seed)}
    if head_tokens is not None:
        panels = {SOURCES["head"]: _panel(head_tokens[test], target[test], classes[test], seed)} | panels
    return result, panels


def _heldout(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Latents `(n, 4, h, w)`, teacher tokens `(n, N, D)`, classes `(n,)` of held-out images, and the null prompt."""
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
    samples = [sample for sample in read_samples(where.csv) if sample.id in cached][:MAX_IMAGES]
    if len(samples) < 16:
        raise UserError(
            f"{len(samples)} held-out images are too few: 16 or more are needed, some hundreds are better"
        )
    ids = [sample.id for sample in samples]
    classes = np.array([sample.class_id for sample in samples])
    return (
        latents_of(latents.read(ids), latents.spec.details).numpy(),
        tokens.read(ids).float().numpy(),
        classes,
        read_table(config.data.text)[0][-1].float(),
    )


def _read_mid_block(config, model, latents, null_text, *, timestep, seed, device):
    """Mid-block features `(n, C, h, w)`, head tokens `(n, N, D)` or None, and the held-out diffusion loss."""
    loss = build_loss(config)
    taps = Taps(model.unet, {"mid": sd15_taps(model.unet)["mid"]})  # also where the run itself taps nothing
    head = dict(model.heads).get("mid")
    features, head_tokens, losses = [], [], []
    levels = torch.linspace(0, loss.schedule.num_steps - 1, LOSS_TIMESTEPS + 2)[1:-1].long()
    size = config.eval.batch_size
    try:
        for start in range(0, len(latents), size):
            x_0 = torch.from_numpy(latents[start : start + size]).to(device)  # (b, 4, h, w)
            noise = initial_noise([seed + start + i for i in range(len(x_0))], x_0.shape[1:]).to(device)
            text = null_text.to(device).expand(len(x_0), -1, -1)
            with taps.recording():
                _predict(loss, model, x_0, noise, timestep, text)
            feature = taps.captured["mid"]  # (b, C, h, w)
            features.append(feature.float().cpu().numpy())
            if head is not None:
                head_tokens.append(head(feature).cpu().numpy())
            # Every image meets one of the levels, the same one for every run.
            t = levels[(start + torch.arange(len(x_0))) % LOSS_TIMESTEPS].to(device)
            losses.append(
                loss.diffusion_error(_predict(loss, model, x_0, noise, t, text), x_0, noise, t).cpu()
            )
    finally:
        taps.remove()
    tokens = np.concatenate(head_tokens) if head_tokens else None
    return np.concatenate(features), tokens, torch.cat(losses).mean().item()


def _predict(loss, model, x_0, noise, timestep, text):
    timesteps = torch.as_tensor(timestep, device=x_0.device).expand(len(x_0))
    noisy = add_noise(x_0, noise, *loss.schedule.at(timesteps))
    return model(noisy, timesteps, text, capture=False)


def _panel(projected: np.ndarray, teacher: np.ndarray, classes: np.ndarray, seed: int) -> TsnePanel:
    """Joint t-SNE of the same few tokens of both sides, of ten classes at most."""
    few = np.unique(classes)[:10]
    images, tokens = np.nonzero(np.isin(classes, few)[:, None] & np.ones(projected.shape[1], bool))
    chosen = np.random.default_rng(seed).permutation(len(images))[:TSNE_TOKENS]
    images, tokens = images[chosen], tokens[chosen]
    x, y = projected[images, tokens], teacher[images, tokens]  # (M, D)
    embedded_x, embedded_y = joint_tsne(x, y, seed)
    caption = f"mean cosine of pairs {paired_cosine(x, y):.2f}, {len(x)} tokens a side, held-out images"
    return TsnePanel(embedded_x, embedded_y, classes[images], caption)
