"""The self-test: run one small forward and backward before a training starts, check every part of the method, and report.

    python train.py --config configs/A.yaml --self-test     # runs the self-test only, without a run folder

It changes no weights, no gradients and no random states. A value that is 0, not finite or not as expected ends the run with the
reason.
"""

import math
import time
from collections import Counter

import torch
from torch import Tensor

from cache.order import StepSampler
from common.errors import UserError
from configs.schema import Config
from method.objective import square, squared_error
from models.aligned import BACKBONE, HEADS
from models.quantize import count_weights
from training.parts import Parts

PROBED = 64  # number of images that are read, spread evenly over the list and so over the shards
FED = 4  # number of these images that go through the network, at most
# Allowed standard deviations of scaled latents, which have about 1. SD-1.5's have 5.5 unscaled and 0.18 scaled twice.
LATENT_STD = (0.3, 3.0)
EQUAL = 1e-3  # tokens of unit length that differ by less in every entry count as equal
NORM_ERROR = 0.05  # largest deviation of a norm from 1; int8 tokens deviate by less


def self_test(parts: Parts, *, step: int = 0) -> None:
    """Test all parts as they are at `step` and print the findings; raises `UserError` with the reason when a test fails."""
    started = time.perf_counter()
    print("self-test")
    values = read_probe(parts)
    check_data(parts, values)
    check_trained(parts)
    if parts.config.align.coeff > 0:
        check_coefficient(parts)
    check_gradients(parts, values, step)
    say("passed", f"in {time.perf_counter() - started:.1f} s")


def read_probe(parts: Parts) -> dict[str, Tensor]:
    """Read a few images spread over the data and return their decoded values, `{field: (n, …)}` on the CPU.

    Raises `UserError` for NaN and infinity.
    """
    dataset = parts.dataset
    # This raises `UserError` where there are fewer images than a batch takes.
    StepSampler(len(dataset), batch_size=parts.config.data.batch_size, seed=0, first_step=0, last_step=1)
    indices = evenly(len(dataset), PROBED)
    count = len(indices)
    raw = {name: torch.empty(count, size, dtype=torch.uint8) for name, size in dataset.value_bytes.items()}
    dataset.read_batch(indices, raw)
    values = {name: dataset.decode[name](raw[name]).float() for name in raw if name != "text"}
    for name, value in values.items():
        finite = value.isfinite().flatten(1).all(1)  # (n,)
        if not finite.all():
            broken = dataset.ids[indices[int((~finite).nonzero()[0])]]
            folder = dataset.readers[name].folder
            fail(f"{folder} holds NaN or infinity for {broken}: script 5 --full says what else is damaged")
    values["latent"] = dataset.x_0(values["latent"])  # (n, C, h, w)
    return values | {"label": dataset.labels[indices]} | parts.batches.conditions(raw["latent"])


def evenly(count: int, few: int) -> list[int]:
    """Return `few` of the numbers below `count`, evenly spread from the first to the last; all where there are no more."""
    few = min(few, count)
    return [round(i * (count - 1) / max(few - 1, 1)) for i in range(few)]


def check_data(parts: Parts, values: dict[str, Tensor]) -> None:
    dataset = parts.dataset
    of_each = Counter(dataset.labels.tolist()).values()
    each = " to ".join(map(str, sorted({min(of_each), max(of_each)})))
    left_out = f", {dataset.left_out} of the CSV are not cached" if dataset.left_out else ""
    what = f"images, {each} of each of {len(of_each)} classes"
    if dataset.captioned:
        noun = "clips" if len(dataset.latent_shape) == 4 else "images"
        what = f"captioned {noun}, {len(of_each):,} different prompts"
    say("data", f"{len(dataset):,} {what}{left_out}")

    std = values["latent"].std().item()
    say("latents", f"{shape_of(values['latent'][0])}, standard deviation {std:.2f}")
    if not LATENT_STD[0] < std < LATENT_STD[1]:
        fail(
            f"latents of {dataset.latents.folder} have standard deviation {std:.3g}, about 1 was expected: run script 2 again"
        )
    for name in parts.batches.image_conditions:
        none = f"not in {dataset.latents.folder}: every image counts as whole and of its own size (script 2 records both)"
        say(name, "size and crop of each image" if name in values else none)
    if "dino_tokens" in values:
        tokens = values["dino_tokens"]  # (n, N, D)
        off = (tokens.norm(dim=-1) - 1).abs().max().item()
        source = dataset.tokens.spec.source
        made_by = f"{source.get('model', 'an unnamed teacher')} ({source.get('implementation', 'unknown')})"
        view = dataset.tokens.spec.view or {}
        how = f"view {view.get('kind', 'unknown')}, positions {source.get('position_embeddings', 'unknown')}"
        say("tokens", f"{shape_of(tokens[0])} of {made_by}, {how}; norms within {off:.2g} of 1")
        if off > NORM_ERROR:
            fail(f"tokens of {dataset.tokens.folder} are not L2-normalised: run script 3 again")
        check_spatial(tokens)
    check_text(parts)


def check_text(parts: Parts) -> None:
    """Check that text is finite, and that prompts differ from each other and from the null prompt; a few if they are read."""
    text, folder, table = parts.dataset.text, parts.config.data.text, parts.batches.table
    where = "read with each batch" if table is None else f"on {parts.device}"
    say("text", f"{len(text):,} prompts and the null prompt, {text.spec.form}, {where}")
    chosen = range(len(text)) if table is not None else evenly(len(text), PROBED)
    # A caption may be the prompt "", which some pipelines make as they make the null prompt.
    labels = [label for label in chosen if text.prompts[label].strip()]
    if not labels:
        return
    fields = parts.batches.prompts(torch.tensor(labels))  # {name: (n, …)}
    if not all(values.isfinite().all() for values in fields.values()):
        fail(f"{folder} holds NaN or infinity: run script 4 again")
    differ = len({text.prompts[label] for label in labels}) > 1
    if differ and all((values == values[0]).all() for values in fields.values()):
        fail(f"all prompts of {folder} have one embedding: run script 4 again")
    null = [(fields[name] == row).flatten(1).all(1) for name, row in parts.batches.null.items()]  # (n,) each
    if torch.stack(null).all(0).any():
        fail(f"a prompt of {folder} has the embedding of the null prompt: run script 4 again")


def check_trained(parts: Parts) -> None:
    config, model = parts.config, parts.model
    trained = model.trained_parameters()
    network, in_heads = (
        sum(p.numel() for n, p in trained.items() if n.startswith(part)) for part in (BACKBONE, HEADS)
    )
    optim = config.optim
    head_lr = optim.lr if optim.head_lr is None else optim.head_lr
    heads = f"; heads {in_heads:,} at {head_lr:g}" if model.heads else ""
    total = sum(count_weights(p) for n, p in model.backbone.named_parameters() if ".lora_" not in n)
    weights = f"{network:,} weights (the {parts.family.noun} has {total:,})"
    say("train", f"{config.model.train}: {weights} at learning rate {optim.lr:g}{heads}")
    if config.model.train == "lora":
        places = {place_of(name) for name in trained if ".lora_" in name}
        blocks = Counter(map(block_of, sorted(places)))
        listed = ", ".join(f"{block} {number}" for block, number in blocks.items())
        scale = config.model.lora_alpha / config.model.lora_rank
        say("lora", f"rank {config.model.lora_rank}, scale {scale:g}, in {len(places)} modules: {listed}")
    if not network:
        fail("no weight of the network is trained: check model.train and model.lora_targets")


def check_coefficient(parts: Parts) -> None:
    schedule, align, steps = parts.coefficient.schedule, parts.config.align, parts.config.train.steps
    # Step 0 comes last, because it has no name even where the warm-up ends there.
    named = {align.warmup_steps: " (end of warm-up)", steps // 2: " (middle)", steps - 1: " (end)", 0: ""}
    values = ", ".join(f"{schedule(at):.3g} at {at:,}{named[at]}" for at in sorted(named) if at < steps)
    also = f"; 0 from step {align.cutoff_step:,}" if align.cutoff_step else ""
    if align.similarity_threshold is not None:
        also += f"; 0 at similarity {align.similarity_threshold:g}, {align.threshold_mode}"
    say("λ", f"{align.schedule}: {values}{also}")
    if not any(schedule(step) > 0 for step in range(min(steps, align.cutoff_step or steps))):
        fail(
            "λ is 0 at every step: check align.cutoff_step and align.warmup_steps, or set align.coeff=0 for a baseline"
        )
    what = f" ({align.manifold} Gram)" if align.manifold_coeff else ": no manifold loss"
    if align.spatial_norm is not None:
        what += f"; teacher's tokens normalised spatially, α = {align.spatial_norm:g}"
    if align.neighbours:
        near = f"1 to {align.neighbours}" if align.cumulative else align.neighbours
        what += f"; neighbours {near} frames away, τ = {align.neighbour_tau:g}"
    say("align", f"w = {align.manifold_coeff:g}{what}")


def fed(config: Config) -> int:
    """Images that go through the network: no more than a batch has, but two, for the Gram matrix of one says nothing."""
    return min(FED, max(2, config.data.batch_size))


def check_gradients(parts: Parts, values: dict[str, Tensor], step: int) -> None:
    """Run a few images forward; check the gradients of both losses at the weights, and those of the alignment at its taps."""
    config, model, device, loss = parts.config, parts.model, parts.device, parts.loss
    latents = values["latent"][: fed(config)].to(device)  # (b, C, h, w)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(latents.shape, device=device, generator=generator)
    timesteps = loss.path.draw(len(latents), device, generator)
    x_t, target, weight = loss.path(latents, noise, timesteps)
    told = {n: values[n][: fed(config)].to(device) for n in parts.batches.image_conditions if n in values}
    text = parts.batches.prompts(values["label"][: fed(config)]) | told
    weights = {name: p for name, p in model.trained_parameters().items() if name.startswith(BACKBONE)}
    # Raises TapError for a tap that is silent or detached.
    output = model.predict(x_t, timesteps, text, capture=True)
    features = {tap: model.taps.captured[tap] for tap in model.heads}  # (b, C, h, w) each
    loss_diff = squared_error(output, target, weight).mean()
    if model.heads:
        teacher, grid = teacher_of(parts, values, latents)
        tokens = model.get_aligned_tokens(grid)  # {tap: (b, N, D)}
        for tap, x in tokens.items():
            if x.shape[1:] != teacher.shape[1:]:
                fail(
                    f"the head of tap {tap} makes tokens {shape_of(x[0])}, the teacher's are {shape_of(teacher[0])}: set "
                    "teacher.dim and teacher.grid"
                )
        terms = loss.alignment(tokens, teacher, grid)
    model.clear_hooks()
    gradients = torch.autograd.grad(loss_diff, list(weights.values()), retain_graph=True, allow_unused=True)
    network = f"{loss.path.output}-network, loss in {loss.path.prediction}"
    if loss.path.snr_gamma is not None:
        network += f", min-SNR γ = {loss.path.snr_gamma:g}"
    norm = math.hypot(*(g.float().norm() for g in gradients if g is not None))
    where = f"{name_of(output.dtype)} on {device}"
    say("L_diff", f"{network}: {loss_diff.item():.4g}, gradient norm {norm:.3g} ({where})")
    if not (output.isfinite().all() and loss_diff.isfinite() and math.isfinite(norm)):
        fail("the network's output or its gradient is not finite: check model.base and train.precision")
    if norm == 0:
        fail(
            "the diffusion loss sends no gradient to the trained weights: check model.train and model.lora_alpha"
        )
    if not model.heads:
        say("align", "λ = 0: baseline, no taps and no heads")
        return
    if not terms["loss_align"].isfinite():
        fail("the alignment loss is not finite: check the teacher's tokens and train.precision")
    heads = [p for p in model.heads.parameters() if p.requires_grad]
    inputs = [*features.values(), *heads, *weights.values()]
    gradients = torch.autograd.grad(terms["loss_align"], inputs, allow_unused=True)
    on = "×".join(map(str, grid))
    for (tap, feature), gradient in zip(features.items(), gradients, strict=False):
        report_tap(parts, tap, on, feature, gradient, terms[f"cosine/{tap}"].item(), step)
    if not any(g is not None and g.any() for g in gradients[len(features) :][: len(heads)]):
        fail("no weight of a head gets gradient: the heads must be trained")
    # Count LoRA by module: its first matrix gets no gradient while its second is 0, as at the start of a training.
    places = set(map(place_of, weights))
    found = zip(weights, gradients[len(features) + len(heads) :], strict=True)
    reached = {place_of(name) for name, g in found if g is not None and g.any()}
    what = "LoRA modules" if config.model.train == "lora" else "trained tensors"
    count = f"{len(reached)} of {len(places)} {what} of the network"
    say("reach", f"the alignment reaches {count}: those before a tap")
    if not reached:
        fail("the alignment reaches no trained weight of the network: train a block at or before a tap")


def teacher_of(parts: Parts, values: dict[str, Tensor], latents: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the teacher's tokens `(b, N, D)` of the few images and their grid.

    Those of an online teacher are computed and checked; those of the network's own block are of the last forward.
    """
    if (block := parts.model.teacher_block) is not None:
        tokens, grid = parts.model.get_teacher_tokens()
        say("teacher", f"{block} of the network itself, {shape_of(tokens[0])}, without gradient")
        return tokens, grid
    if parts.online is None:
        tokens = values["dino_tokens"][: fed(parts.config)].to(parts.device)
        return tokens, parts.batches.grid or square(tokens)
    tokens = parts.online(latents)
    decoder, encoder = parts.online.codec.vae, parts.online.encoder
    made_by = f"{parts.config.teacher.model} ({encoder.implementation})"
    say("teacher", f"{made_by} online, through {type(decoder).__name__}")
    check_spatial(tokens)
    return tokens, parts.batches.grid or square(tokens)


def report_tap(
    parts: Parts, tap: str, on: str, feature: Tensor, gradient: Tensor | None, cosine: float, step: int
) -> None:
    path, align = parts.model.taps.paths[tap], parts.config.align
    if gradient is None or not gradient.any():
        fail(f"tap {tap} ({path}) gets no gradient from the alignment: its head is cut off or constant")
    norm = gradient.float().norm().item()
    share = (gradient.abs().sum(1) > 0).float().mean().item()  # over (b, h, w)
    say(
        f"tap {tap}",
        f"{path} {shape_of(feature[0])} {name_of(feature.dtype)} → {align.head} → {on}; at step {step} cosine {cosine:+.3f}, "
        f"L_align's gradient there {norm:.3g}, cells reached {share:.0%}",
    )
    if not math.isfinite(norm):
        fail(f"the gradient at tap {tap} ({path}) is not finite")
    if share < 1:
        fail(
            f"only {share:.0%} of the cells of tap {tap} ({path}) get gradient: the teacher is no token grid over them"
        )


def check_spatial(tokens: Tensor) -> None:
    """End the run when tokens `(n, N, D)` are equal within images, as copies of a CLS vector are, or equal for all images."""
    flat = (tokens - tokens[:, :1]).abs().flatten(1).amax(1) < EQUAL  # (n,)
    if flat.float().mean() > 0.1:
        fail(
            f"of {flat.sum()} in {len(tokens)} images all tokens are equal: these are no patch tokens; run script 3 again"
        )
    if len(tokens) > 1 and (tokens - tokens[:1]).abs().max() < EQUAL:
        fail("the teacher's tokens are the same for all images: run script 3 again")


def place_of(name: str) -> str:
    """Return the module in the network that a LoRA weight belongs to; another weight is returned as it is."""
    return name.removeprefix(BACKBONE).split(".lora_")[0]


def block_of(place: str) -> str:
    """Return the block of a module: the first part of its dotted name, with the number that follows, if there is one."""
    first, *rest = place.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdecimal() else first


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def say(name: str, text: str) -> None:
    print(f"  {name:<14} {text}", flush=True)


def fail(reason: str) -> None:
    raise UserError(f"self-test: {reason}")
