"""The plan: forecast the operations, memory, disk and time of a training before it starts.

Operations and memory are counted on the device "meta", from shapes only: nothing is computed and no weight is read. One
multiply-add is two operations; norms, activations, softmax and resizing are not counted.
"""

import math
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache.dataset import latent_shape
from cache.manifest import read_manifest
from cache.text import keeps_table, read_text_manifest, table_bytes
from common.device import compute_dtype, pick_device
from common.errors import UserError
from configs.schema import Config
from models.aligned import AlignedModel
from models.backbone import Backbone
from models.quantize import QUANTIZATIONS, quantized_weights
from training.optimizers import OPTIMIZERS
from training.parts import build_model, build_online_teacher, family_for
from training.plan_count import StepCost, count_step, saved_bytes, work_of
from training.plan_time import plan_measured, plan_time
from training.self_test import name_of, say

PROMPTS = 1000  # of the classes of ImageNet, where there is no text yet
# Memory of cards in GB, and the share of it that a training should fill at most.
CARDS, ROOM = (8, 12, 16, 24, 32, 40, 48, 80, 141), 0.85
GB = 1e9
_COUNTED: dict[tuple, tuple[float, float]] = {}


def print_plan(config: Config) -> None:
    """Print the plan of one process of a training; this loads only configs and manifests."""
    device = pick_device(config.train.device)
    dtype = compute_dtype(device, config.train.precision)
    if device.type == "cpu" and config.train.precision == "auto":
        dtype = torch.bfloat16  # a plan printed on a machine without GPU is meant for a GPU
    model, known = model_of_shapes(config, dtype)
    images = config.data.batch_size * config.optim.accumulate
    shape = shape_of_latents(config) or model.family.latent_shape(model.backbone)
    forward = forward_of(model, shape, config.teacher.cells)
    cost = count_step(forward)
    print(f"plan of {config.run}")
    if not known:
        say("base", f"{config.model.base} is not at hand: the sizes of {model.family.name} are assumed")
    if model.family.forecast_assumes:
        say("counted", f"as if {model.family.forecast_assumes}")
    plan_parameters(config, model)
    each = f"{cost.forward / 1e9:.3g} forward and {cost.backward / 1e9:.3g} backward GFLOP an image"
    say("step", f"{images} images: {cost.flops * images / 1e12:.4g} TFLOP ({each})")
    plan_parts(cost, model)
    saved = saved_bytes(lambda: forward(1), list(model.parameters()))
    teacher = plan_online_teacher(config, model.family, shape)
    plan_memory(config, model, dtype, saved)
    plan_disk(config, model)
    read = plan_cache(config, shape)
    text, each = text_bytes(config, model, dtype)
    where = f"read with each batch, {each / 1e3:.0f} kB an image" if each else "of all prompts"
    say("text", f"{text / GB:.3g} GB on each device, {where} (data.text_on_device)")
    results, done = flops_of(model, forward, cost.flops), cost.flops
    work = work_of(forward, (done - results) / cost.forward)
    work["linear layers"] = work.get("linear layers", 0.0) + teacher
    flops = results + teacher, done + teacher
    trained = sum(p.numel() for p in model.trained_parameters().values())
    plan_time(config, work, flops, trained, device, read + each)
    plan_measured(config)


def model_of_shapes(config: Config, dtype: torch.dtype) -> tuple[AlignedModel, bool]:
    """Return the model on the device "meta", in the precision of the training, and whether its base model was found."""
    family = family_for(config)
    network, known = family.network_of_shapes(local=config.model.base == family.default_base)
    with torch.device("meta"):
        model = build_model(config.model, config.align, config.teacher, config.seed, family, network)
        family.forecast(network)
        return model.to(dtype).train(), known


def forward_of(model: AlignedModel, shape: tuple[int, ...], grid: tuple[int, int]) -> Callable[[int], Tensor]:
    """Return a function from a batch size to a loss on latents `(C, h, w)` and tokens on a grid; `model` is on "meta"."""

    def forward(batch: int) -> Tensor:
        with torch.device("meta"):
            latents = torch.empty(batch, *shape)
            shapes = model.family.text_shapes(model.backbone)
            text = {
                name: torch.empty(batch, *row, dtype=torch.uint8 if name.endswith("mask") else None)
                for name, row in shapes.items()
            }
            steps = torch.zeros(batch, dtype=torch.long)
            output = model.predict(latents, steps, text, capture=bool(model.heads))
            loss = output.float().square().mean()
            if model.heads:
                tokens = model.get_aligned_tokens(grid).values()
                loss = loss + sum(x.square().mean() for x in tokens)  # as cheap as the real losses
        model.clear_hooks()
        return loss

    return forward


def step_flops(config: Config) -> tuple[float, float]:
    """Return the operations of one step on one process: of its results, and with what gradient checkpointing computes again.

    The count takes a second, and is kept for each kind of model, whatever the schedules and weights of its losses.
    """
    shape, align = shape_of_latents(config), config.align
    key = (
        config.model,
        align.taps if align.coeff > 0 else (),
        align.head,
        align.head_hidden,
        config.teacher,
        shape,
    )
    if key not in _COUNTED:
        model, _ = model_of_shapes(config, torch.float32)
        forward = forward_of(model, shape, config.teacher.cells)
        done = count_step(forward).flops
        _COUNTED[key] = flops_of(model, forward, done), done
    flops, done = _COUNTED[key]
    images = config.data.batch_size * config.optim.accumulate
    return flops * images, done * images


def flops_of(model: AlignedModel, forward: Callable[[int], Tensor], done: float) -> float:
    """Return operations of an image's results: those `done` without what checkpointing repeats; it is off afterwards."""
    if not model.checkpointing:
        return done
    model.checkpoint(False)
    return count_step(forward).flops


def shape_of_latents(config: Config) -> tuple[int, ...] | None:
    """Return the shape `(C, h, w)` of the cached latents, or None where there is no cache yet."""
    try:
        manifest = read_manifest(config.data.latents, "latents")
    except UserError:
        return None
    return latent_shape(manifest["shape"], manifest["details"])


def plan_parameters(config: Config, model: AlignedModel) -> None:
    network = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    heads = sum(p.numel() for p in model.heads.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = f"{network:,} of the {model.family.noun} are trained ({config.model.train})"
    say("weights", f"{trained}, {heads:,} of heads, {frozen:,} are frozen")


def plan_parts(cost: StepCost, model: AlignedModel) -> None:
    """Print the forward operations of each top-level module of the network, and of each module in a list of modules."""
    parts = {}
    for name, module in model.backbone.named_children():
        items = [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
        parts |= {item: cost.modules.get(item, 0.0) for item in items}
    parts["alignment"] = cost.forward - sum(parts.values())
    say("forward GFLOP", ", ".join(f"{name} {flops / 1e9:.4g}" for name, flops in parts.items() if flops > 0))


def plan_online_teacher(config: Config, family: Backbone, shape: tuple[int, ...]) -> float:
    """Print what the online teacher costs beside the step; returns its operations an image, 0 where tokens are cached."""
    if config.teacher.source != "online" or config.align.coeff == 0:
        return 0.0
    try:
        teacher = build_online_teacher(config.teacher, family, shape, torch.device("meta"), torch.float32)
    except UserError as error:
        say("online teacher", f"not counted: {error}")
        return 0.0
    with FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, *shape, device="meta"))
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    say(
        "online teacher",
        f"{counter.get_total_flops() / 1e9:.4g} GFLOP an image more; {weights / GB:.3g} GB of weights beside the memory below",
    )
    return counter.get_total_flops()


def planned_bytes(config: Config, model: AlignedModel, dtype: torch.dtype, saved: float) -> dict[str, float]:
    """Return the memory of a training on each device, by what it is for; autograd keeps `saved` bytes an image."""
    trained = sum(p.numel() for p in model.trained_parameters().values())
    own = 0 if dtype == torch.float32 else 4 * trained  # fp32 masters
    gradients = (4 + (dtype.itemsize if own else 0)) * trained
    moments, average = OPTIMIZERS[config.optim.name].state_bytes * trained, 4 * trained
    weights, unpacked = bytes_of_weights(config, model, dtype)
    return {
        "kept for backward": saved * config.data.batch_size + unpacked,
        "weights": weights,
        "gradients, masters, AdamW and EMA": own + gradients + moments + average,
        "text": text_bytes(config, model, dtype)[0],
    }


def bytes_of_weights(config: Config, model: AlignedModel, dtype: torch.dtype) -> tuple[float, float]:
    """Return the memory of all weights, those quantised in fewer bits, and what backward keeps of them in `dtype`."""
    every = [*model.parameters(), *model.buffers()]
    if config.model.quantize == "none":
        return sum(x.numel() * x.element_size() for x in every), 0.0
    how, quantized = QUANTIZATIONS[config.model.quantize], quantized_weights(model.backbone)
    held = sum(x.numel() * (how.bits / 8 if id(x) in quantized else x.element_size()) for x in every)
    unpacked = sum(x.numel() * dtype.itemsize for x in quantized.values())
    return held, unpacked if how.unpacks and not config.model.gradient_checkpointing else 0.0


def text_bytes(config: Config, model: AlignedModel, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of text on each device, and those that are read for each image: 0 where all text stays on the device."""
    shapes = model.family.text_shapes(model.backbone).values()
    try:
        manifest = read_text_manifest(config.data.text)
        prompts, each = manifest["num_prompts"], manifest["shape"][0]
    except UserError:
        prompts, each = PROMPTS, table_bytes(shapes, 0, torch.float16)
    table = table_bytes(shapes, prompts, dtype)
    if keeps_table(config.data.text_on_device, table):
        return table, 0
    return table_bytes(shapes, config.data.batch_size, dtype), each


def plan_memory(config: Config, model: AlignedModel, dtype: torch.dtype, saved: float) -> None:
    parts = planned_bytes(config, model, dtype, saved)
    total = sum(parts.values())
    card = next((size for size in CARDS if total / GB <= ROOM * size), None)
    fits = f"should fit a card of {card} GB" if card else "fits no card: see docs/performance.md"
    listed = ", ".join(f"{count / GB:.3g} {what}" for what, count in parts.items())
    say(
        "memory",
        f"about {total / GB:.3g} GB on each device: {listed} "
        f"({name_of(dtype)}; without what kernels need in passing): {fits}",
    )


def plan_disk(config: Config, model: AlignedModel) -> None:
    trained = sum(p.numel() for p in model.trained_parameters().values())
    train = config.train
    # weights and their moving average in fp32, and the optimiser's state
    one = (4 + 4 + OPTIMIZERS[config.optim.name].state_bytes) * trained
    kept = min(train.keep_checkpoints + 1, -(-train.steps // train.checkpoint_every))
    if train.keep_every:
        kept += train.steps // train.keep_every
    run = config.run.absolute()
    there = next(folder for folder in (run, *run.parents) if folder.exists())  # a new run has no folder yet
    free = shutil.disk_usage(there).free
    warning = "" if kept * one < free else ": NOT ENOUGH"
    size = f"{one / GB:.2f} GB each, {kept * one / GB:.1f} GB at most"
    say("checkpoints", f"{size}; {free / GB:.0f} GB are free{warning}")


def plan_cache(config: Config, shape: tuple[int, ...]) -> float:
    """Print how large the cached fields are, or will be for latents of `shape`.

    Returns the bytes that training reads for each image, 0 where there is no cache.
    """
    fields = [("latents", config.data.latents, 2, math.prod(shape))]  # name, folder, script, numbers an image
    if config.teacher.source == "cached" and config.align.coeff > 0:
        fields.append(("tokens", config.data.tokens, 3, math.prod(config.teacher.cells) * config.teacher.dim))
    read_in_all = 0.0
    for name, folder, script, numbers in fields:
        try:
            manifest = read_manifest(folder, name)
        except UserError:
            size = f"{2 * numbers / 1e3:.0f} kB an image in fp16, {2 * numbers / 1e4:.1f} GB for 100,000"
            say(name, f"{folder} is not there yet: script {script} makes it, {size}")
        else:
            size = sum(shard["bytes"] for shard in manifest["shards"])
            read = size / manifest["num_samples"]
            read_in_all += read
            say(name, f"{size / GB:.2f} GB, {manifest['num_samples']:,} images of {read / 1e3:.0f} kB")
    return read_in_all
