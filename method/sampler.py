"""Draw latents from text embeddings with diffusers' schedulers, so that each sample depends only on its own seed."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Functions of (ᾱ, DDPM indices) that return the noise level on REPA's scale: 0 = data, 1 = noise. On REPA's linear path
# x_t = (1 - t) x0 + t ε the ratio sigma / alpha is t / (1 - t); "snr" inverts that for SD's noise schedule.
NOISE_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "snr": lambda abar, t: (1 - abar[t]).sqrt() / ((1 - abar[t]).sqrt() + abar[t].sqrt()),
    "index": lambda abar, t: t / len(abar),
}
# The number of samples in every forward on a CPU. It is fixed, because another number rounds differently.
CPU_ROWS = 16


def balanced_labels(indices: Sequence[int], num_classes: int) -> list[int]:
    """Return the class i mod `num_classes` for each sample i: the classes are balanced and interleaved.

    They are interleaved because the Inception score splits files in their order: files sorted by class gave a score of 62,
    the same images in another order gave 298.
    """
    return [i % num_classes for i in indices]


def random_labels(indices: Sequence[int], num_classes: int, seed: int) -> list[int]:
    """Draw a random class for each sample, as DiT, ADM and REPA do; the class of sample i depends only on (seed, i)."""
    return [int(np.random.default_rng([seed, i]).integers(num_classes)) for i in indices]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per sample, which gives the same numbers on every machine and in every batch."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def initial_noise(
    seeds: Sequence[int] | Sequence[torch.Generator], shape: Sequence[int], device="cpu"
) -> Tensor:
    """Draw standard normal noise (B, *shape), float32, from one seed or generator per sample."""
    if not seeds:
        raise ValueError("no seeds")
    streams = seeds if isinstance(seeds[0], torch.Generator) else generators(seeds)
    return torch.stack([torch.randn(tuple(shape), generator=stream) for stream in streams]).to(device)


def guided_steps(
    alphas_cumprod: Tensor, timesteps: Tensor, *, high: float, low: float = 0.0, space: str = "snr"
) -> list[bool]:
    """Return for each of `timesteps` (DDPM indices) whether guidance acts: where the noise level is in [`low`, `high`].

    The level runs from 0 (data) to 1 (noise) as in REPA, so `high` = 0.7 switches guidance off at the noisy
    end. `space` says how SD's noise schedule is mapped to that scale: "snr" (equal noise, index 605 for 0.7) or
    "index" (the fraction of the index, 700).
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"a guidance interval is 0 <= low <= high <= 1, got {low} and {high}")
    if space not in NOISE_LEVELS:
        raise ValueError(f"guidance_space must be one of {sorted(NOISE_LEVELS)}, got {space!r}")
    levels = NOISE_LEVELS[space](alphas_cumprod.double().cpu(), timesteps.cpu().long())  # (steps,)
    return ((low <= levels) & (levels <= high)).tolist()


def is_flow(scheduler) -> bool:
    """Return whether one of diffusers' schedulers is for flow matching; those made for nothing else do not say so."""
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def set_steps(
    scheduler, steps: int, spacing: Mapping[str, object], device: torch.device | str = "cpu"
) -> None:
    """Set the timesteps of a scheduler; `spacing` are the further arguments that a family's pipeline hands to it."""
    count = {} if "sigmas" in spacing else {"num_inference_steps": steps}
    scheduler.set_timesteps(**count, device=device, **spacing)


def forwards_per_image(guided: Sequence[bool]) -> int:
    """Return how many forwards of the network a sample costs: two at each step where guidance acts, else one."""
    return len(guided) + sum(guided)


@torch.no_grad()
def sample_latents(
    predict: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
    scheduler,
    text: Mapping[str, Tensor],
    null_text: Mapping[str, Tensor],
    seeds: Sequence[int],
    *,
    shape: Sequence[int],
    steps: int,
    cfg: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    guidance_space: str = "snr",
    eta: float = 0.0,
    rows: int | None = None,
    spacing: Mapping[str, object] | None = None,
) -> Tensor:
    """Draw latents in fp32, the same as the family's diffusers pipeline draws from the same generators.

    `scheduler` is one of diffusers' that takes DDPM indices (DDIM, DDPM, DPM-Solver++) or is for flow matching; `spacing` goes
    to `set_steps`. `predict(x_t, t, text)` is `AlignedModel.predict`. `text` holds the fields (B, …) of the prompts,
    `null_text` those (…) of the null prompt; latents are on the device of these fields. The generator of seed b draws the
    first noise of sample b, then the noise that the scheduler adds at each step (DDPM; DDIM with `eta` > 0), and nothing else.

    Every forward has `rows` samples, and the last one is filled up with copies that are discarded. A sample thus does
    not depend on how many others are drawn, although kernels sum in another order for another number. None means
    `CPU_ROWS` on a CPU and all B elsewhere. `cfg` >= 1 is the guidance scale as in diffusers. Guidance costs one
    forward of twice the rows; where it does not act (`cfg` 1, or a noise level outside [`guidance_low`,
    `guidance_high`], see `guided_steps`) the unconditional half is not computed at all.

    Returns (B, C, h, w). The scheduler handed in is not changed.
    """
    first = next(iter(text.values()))
    if {name: x.shape[1:] for name, x in text.items()} != {name: x.shape for name, x in null_text.items()}:
        raise ValueError("each field of text must be (B, …), and (…) in null_text")
    if len(seeds) != len(first):
        raise ValueError(f"{len(seeds)} seeds for {len(first)} captions")
    if len(shape) not in (3, 4):
        raise ValueError(f"shape must be (C, h, w) or (C, f, h, w), got {tuple(shape)}")
    if steps < 1 or cfg < 1 or (rows is not None and rows < 1):
        raise ValueError(f"steps, cfg and rows must be at least 1, got {steps}, {cfg} and {rows}")
    device = first.device
    rows = forward_rows(device, len(first)) if rows is None else rows
    null = {name: x.expand(rows, *x.shape) for name, x in null_text.items()}  # (R, …)
    found = []
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        own = list(seeds[part])
        cond = {name: filled(x[part], rows) for name, x in text.items()}  # (R, …)
        streams = generators(own + own[-1:] * (rows - len(own)))
        solver = copy.deepcopy(scheduler)
        set_steps(solver, steps, spacing or {}, device)
        guided = guidance_plan(solver, cfg, guidance_low, guidance_high, guidance_space)
        both = {name: torch.cat([null[name], cond[name]]) for name in cond}  # (2R, …)
        extra = _step_options(solver, streams, eta)
        x = initial_noise(streams, shape, device) * getattr(solver, "init_noise_sigma", 1.0)  # (R, C, h, w)
        for t, guide in zip(solver.timesteps, guided, strict=True):
            x_in = torch.cat([x, x]) if guide else x  # (R or 2R, C, h, w)
            if hasattr(solver, "scale_model_input"):
                x_in = solver.scale_model_input(x_in, t)
            # In fp64, from which a network that is told 1000 t gets the scheduler's own number back.
            time = t.double() / solver.config.num_train_timesteps if is_flow(solver) else t
            out = predict(x_in, time.expand(len(x_in)), both if guide else cond).float()  # (R or 2R, C, h, w)
            if guide:
                uncond, cond_out = out.chunk(2)  # (R, C, h, w) each
                out = uncond + cfg * (cond_out - uncond)
            x = solver.step(out, t, x, return_dict=False, **extra)[0]  # (R, C, h, w)
        found.append(x[: len(own)])
    return torch.cat(found)


def guidance_plan(scheduler, cfg: float, low: float, high: float, space: str) -> list[bool]:
    """Return for each timestep that was set in a scheduler whether guidance acts."""
    if cfg == 1:
        return [False] * len(scheduler.timesteps)
    if is_flow(scheduler):  # whose time is REPA's noise level
        levels = scheduler.timesteps.double().cpu() / scheduler.config.num_train_timesteps
        return ((low <= levels) & (levels <= high)).tolist()
    return guided_steps(scheduler.alphas_cumprod, scheduler.timesteps, low=low, high=high, space=space)


def forward_rows(device: torch.device, batch_size: int) -> int:
    """Return the number of samples in a forward: `batch_size` on a GPU, always `CPU_ROWS` on a CPU."""
    return CPU_ROWS if device.type == "cpu" else batch_size


def filled(x: Tensor, rows: int) -> Tensor:
    """Fill up the first dimension to `rows` with copies of the last entry."""
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])]) if len(x) < rows else x


def _step_options(scheduler, streams: list[torch.Generator], eta: float) -> dict:
    """Return the options that `scheduler.step` accepts; raises `ValueError` for an eta that it would ignore."""
    known = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in known:
        raise ValueError(f"{type(scheduler).__name__} has no eta")
    return {name: value for name, value in {"generator": streams, "eta": eta}.items() if name in known}
