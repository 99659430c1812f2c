"""From text embeddings to images by diffusers' schedulers, in which an image depends on its own seed alone."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

# How much noise there is at a DDPM index, on REPA's scale: 0 = data, 1 = noise. On REPA's linear path
# x_t = (1 - t) x0 + t ε the ratio sigma / alpha is t / (1 - t); "snr" inverts that for SD's schedule.
NOISE_LEVELS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "snr": lambda abar, t: (1 - abar[t]).sqrt() / ((1 - abar[t]).sqrt() + abar[t].sqrt()),
    "index": lambda abar, t: t / len(abar),
}
# Images in a forward on a CPU, always: another number rounds differently.
CPU_ROWS = 16


def balanced_labels(indices: Sequence[int], num_classes: int) -> list[int]:
    """Image i shows class i mod `num_classes`: balanced and interleaved.

    Interleaved, because the Inception score splits files in their order: class-sorted files read 62 where
    the same images in another order read 298.
    """
    return [i % num_classes for i in indices]


def random_labels(indices: Sequence[int], num_classes: int, seed: int) -> list[int]:
    """A class drawn at random for each image, as DiT, ADM and REPA do; that of image i depends on (seed, i) alone."""
    return [int(np.random.default_rng([seed, i]).integers(num_classes)) for i in indices]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image: the same numbers on every machine, and in whatever batch the image is."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def initial_noise(
    seeds: Sequence[int] | Sequence[torch.Generator], shape: Sequence[int], device="cpu"
) -> torch.Tensor:
    """Standard normal noise (B, *shape), float32, of one seed or generator per image."""
    if not seeds:
        raise ValueError("no seeds")
    streams = seeds if isinstance(seeds[0], torch.Generator) else generators(seeds)
    return torch.stack([torch.randn(tuple(shape), generator=stream) for stream in streams]).to(device)


def guided_steps(
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    high: float,
    low: float = 0.0,
    space: str = "snr",
) -> list[bool]:
    """At which of `timesteps` (DDPM indices) guidance acts: where the noise level is in [`low`, `high`].

    The level runs from 0 (data) to 1 (noise) as in REPA, so `high` = 0.7 switches guidance off at the noisy
    end. `space` says how SD's schedule is put on that scale: "snr" (equal noise, index 605 for 0.7) or
    "index" (the fraction of the index, 700).
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"a guidance interval is 0 <= low <= high <= 1, got {low} and {high}")
    if space not in NOISE_LEVELS:
        raise ValueError(f"guidance_space must be one of {sorted(NOISE_LEVELS)}, got {space!r}")
    levels = NOISE_LEVELS[space](alphas_cumprod.double().cpu(), timesteps.cpu().long())  # (steps,)
    return ((low <= levels) & (levels <= high)).tolist()


def forwards_per_image(guided: Sequence[bool]) -> int:
    """Forwards of the network that an image costs: two where guidance acts, else one."""
    return len(guided) + sum(guided)


@torch.no_grad()
def sample_latents(
    predict: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor],
    scheduler,
    text: Mapping[str, torch.Tensor],
    null_text: Mapping[str, torch.Tensor],
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
) -> torch.Tensor:
    """Sample latents in fp32 as the family's own diffusers pipeline would from the same generators.

    `scheduler` is one of diffusers' that takes DDPM indices (DDIM, DDPM, DPM-Solver++); `predict(x_t, t, text)` is
    `AlignedModel.predict`. `text` holds the fields (B, …) of the prompts, `null_text` those (…) of the null prompt;
    latents are on their device. The generator of seed b draws the first noise of image b, then what the scheduler
    adds to it at each step (DDPM; DDIM with `eta` > 0), and nothing else.

    Every forward has `rows` images, the last one filled up with copies that are thrown away, so that an image
    does not depend on how many others there are: kernels sum in another order for another number. None =
    `CPU_ROWS` on a CPU, all B elsewhere. `cfg` >= 1 is the guidance scale as in diffusers. Guidance costs one
    forward of twice the rows; where it does not act (`cfg` 1, or a noise level outside [`guidance_low`,
    `guidance_high`], see `guided_steps`) the unconditional half is not computed at all.

    Returns (B, C, h, w). The scheduler handed in is not changed.
    """
    first = next(iter(text.values()))
    if {name: x.shape[1:] for name, x in text.items()} != {name: x.shape for name, x in null_text.items()}:
        raise ValueError("each field of text must be (B, …), and (…) in null_text")
    if len(seeds) != len(first):
        raise ValueError(f"{len(seeds)} seeds for {len(first)} captions")
    if len(shape) != 3:
        raise ValueError(f"shape must be (C, h, w), got {tuple(shape)}")
    if steps < 1 or cfg < 1 or (rows is not None and rows < 1):
        raise ValueError(f"steps, cfg and rows must be at least 1, got {steps}, {cfg} and {rows}")
    device = first.device
    rows = rows_of(device, len(first)) if rows is None else rows
    null = {name: x.expand(rows, *x.shape) for name, x in null_text.items()}  # (R, …)
    found = []
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        wanted = len(seeds[part])
        cond = {name: _filled(x[part], rows) for name, x in text.items()}  # (R, …)
        streams = generators(_filled_list(list(seeds[part]), rows))
        solver = copy.deepcopy(scheduler)
        solver.set_timesteps(steps, device=device)
        guided = guidance_plan(solver, cfg, guidance_low, guidance_high, guidance_space)
        both = {name: torch.cat([null[name], cond[name]]) for name in cond}  # (2R, …)
        extra = _step_options(solver, streams, eta)
        x = initial_noise(streams, shape, device) * solver.init_noise_sigma  # (R, C, h, w)
        for t, guide in zip(solver.timesteps, guided, strict=True):
            x_in = solver.scale_model_input(torch.cat([x, x]) if guide else x, t)  # (R or 2R, C, h, w)
            out = predict(x_in, t.expand(len(x_in)), both if guide else cond).float()  # (R or 2R, C, h, w)
            if guide:
                uncond, cond_out = out.chunk(2)  # (R, C, h, w) each
                out = uncond + cfg * (cond_out - uncond)
            x = solver.step(out, t, x, return_dict=False, **extra)[0]  # (R, C, h, w)
        found.append(x[:wanted])
    return torch.cat(found)


def guidance_plan(scheduler, cfg: float, low: float, high: float, space: str) -> list[bool]:
    """At which steps of a scheduler, whose timesteps are set, guidance acts."""
    if cfg == 1:
        return [False] * len(scheduler.timesteps)
    return guided_steps(scheduler.alphas_cumprod, scheduler.timesteps, low=low, high=high, space=space)


def rows_of(device: torch.device, batch_size: int) -> int:
    """Images in a forward: what is asked for on a GPU, always `CPU_ROWS` on a CPU."""
    return CPU_ROWS if device.type == "cpu" else batch_size


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first dimension filled up to `rows` with copies of the last entry."""
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])]) if len(x) < rows else x


def _filled_list(values: list, rows: int) -> list:
    return values + values[-1:] * (rows - len(values))


def _step_options(scheduler, streams: list[torch.Generator], eta: float) -> dict:
    """What `scheduler.step` takes of these; raises `ValueError` for an eta that it would ignore."""
    known = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in known:
        raise ValueError(f"{type(scheduler).__name__} has no eta")
    return {name: value for name, value in {"generator": streams, "eta": eta}.items() if name in known}
