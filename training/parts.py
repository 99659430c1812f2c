"""Build the dataset, the model and the loss from a config, for training and for evaluation."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NoReturn

import torch
from torch import Tensor, nn

from cache.batch_stream import TrainingBatches
from cache.dataset import AlignedDataset
from cache.text import is_shorter, keeps_table, table_bytes
from common.device import compute_dtype, pick_device
from common.errors import UserError
from common.sides import covers
from configs.aliases import hub_id
from configs.align import Align
from configs.schema import Config
from configs.sections import Data, Diffusion, Model, Teacher
from method.coefficient import Coefficient, CoefficientSchedule, SimilarityCutoff
from method.neighbours import Neighbours
from method.objective import Objective
from method.paths import Path
from models.aligned import AlignedModel, family_lora
from models.backbone import Backbone
from models.latents import LatentCodec
from models.pipeline_parts import weights_digest
from models.prompts import PromptEncoder
from models.teachers.online import OnlineTeacher, load_decoder
from models.teachers.table import load_teacher
from training.checkpoint import WEIGHTS, checkpoints, load_weights, trained_file_of
from training.frozen import keep_no_inputs
from training.kernels import to_channels_last
from training.masters import Masters
from training.network import family_for, load_network
from training.ranks import Ranks
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Parts:
    """The objects that a training uses, built from one config."""

    config: Config
    ranks: Ranks
    family: Backbone
    model: AlignedModel
    masters: Masters
    loss: Objective
    dataset: AlignedDataset
    batches: TrainingBatches
    coefficient: Coefficient
    online: OnlineTeacher | None
    device: torch.device

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Give the network these trained weights and eval mode; at the end of the block restore weights and mode."""
        network = self.model.backbone
        was_training = network.training
        network.eval()
        try:
            # Run without the compiled graph, because another batch size would compile the network again.
            with self.masters.showing(values), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            network.train(was_training)


def build_parts(config: Config) -> Parts:
    """Build all parts and check that they fit together; raises `UserError` where they do not."""
    device = pick_device(config.train.device)
    dtype = compute_dtype(device, config.train.precision)
    family = family_for(config)
    aligned = config.align.coeff > 0
    dataset = open_cache(config.data, config.teacher, need_tokens=aligned)
    check_neighbours(config.align, dataset.latent_shape)
    size = table_bytes(dataset.text.shapes.values(), len(dataset.text), dtype)
    if not keeps_table(config.data.text_on_device, size):
        dataset.read_text_with_batches()
    network = load_network(config.model, family, dtype, device)
    model = build_model(config.model, config.align, config.teacher, config.seed, family, network)
    model = model.to(device).train()
    check_fit(config.data, family, model.backbone, dataset)
    if config.model.init_from is not None and not checkpoints(config.run / "checkpoints"):
        start_from(config.model, model)
    last = config.train.channels_last
    if (device.type == "cuda" and dtype == torch.bfloat16) if last is None else last:
        to_channels_last(model.backbone)
    masters = Masters(model, dtype)  # converts the model to this dtype
    online = (
        build_online_teacher(config.teacher, family, dataset.latent_shape, device, dtype) if aligned else None
    )
    batches = TrainingBatches(
        dataset,
        device,
        model.dtype,
        caption_dropout=config.data.caption_dropout,
        teacher=online,
        grid=config.teacher.cells,
        image_conditions=family.image_conditions,
    )
    return Parts(
        config=config,
        ranks=Ranks(cpu=device.type == "cpu"),
        family=family,
        model=model,
        masters=masters,
        loss=build_objective(config.align, build_path(config.diffusion, family, dataset.latent_shape)),
        dataset=dataset,
        batches=batches,
        coefficient=build_coefficient(config.align, config.train.steps),
        online=online,
        device=device,
    )


def start_from(settings: Model, model: AlignedModel) -> None:
    """Load the weights that `model.init_from` names; raises `UserError` where they were trained with another LoRA scale."""
    file, weights = trained_file_of(settings.init_from)
    if settings.train == "lora" and (file.parents[2] / "config.yaml").exists():
        theirs = RunFolder(file.parents[2]).config.model
        if theirs.train == "lora" and theirs.lora_alpha != settings.lora_alpha:
            raise UserError(
                f"{file} was trained with model.lora_alpha={theirs.lora_alpha:g}, which scales it: choose the same, not "
                f"{settings.lora_alpha:g}"
            )
    model.load_trained(file, weights)
    print(f"starts from {file}")


def open_cache(data: Data, teacher: Teacher, *, need_tokens: bool) -> AlignedDataset:
    """Open the cached training data, and check that its tokens were made by the teacher that the config names."""
    folder = data.tokens if teacher.source == "cached" else None
    dataset = AlignedDataset(data.csv, data.latents, folder, data.text, need_tokens=need_tokens)
    if need_tokens and teacher.source != "backbone" and not covers(teacher.grid, dataset.latent_shape[-2:]):
        raise UserError(
            f"teacher.grid = {list(teacher.cells)} is not of the shape of latents {dataset.latent_shape}: give [height, width] "
            "of a grid whose cells are about as high as they are wide"
        )
    if dataset.tokens is None:
        return dataset
    spec, wanted = dataset.tokens.spec, (dataset.frames * math.prod(teacher.cells), teacher.dim)
    made_by = spec.source.get("model") or "an unnamed teacher"
    if teacher.model is not None and hub_id(teacher.model) != hub_id(made_by):
        raise UserError(
            f"{data.tokens} was made by {made_by}, teacher.model says {teacher.model}: if they are the same, set "
            f"teacher.model={made_by}, else run script 3 with --teacher {teacher.model}"
        )
    if spec.shape != wanted or dataset.token_grid != teacher.cells:
        raise UserError(
            f"{data.tokens} holds tokens {spec.shape} on a grid {dataset.token_grid}, the config's teacher makes {wanted} on "
            f"{teacher.cells}: set teacher.dim and teacher.grid, or run script 3 with that teacher"
        )
    return dataset


def check_neighbours(align: Align, shape: Sequence[int]) -> None:
    """Raise `UserError` where no frame of latents of `shape (C, …)` has a neighbour at the distance that is asked for."""
    frames = shape[1] if len(shape) == 4 else 1
    if align.coeff > 0 and align.neighbours > 0 and (align.neighbours >= frames or frames == 1):
        what = f"the clips have {frames} frames" if frames > 1 else "the latents are of images"
        raise UserError(
            f"align.neighbours = {align.neighbours} reaches no other frame, {what}: set a smaller one, or 0"
        )


def build_online_teacher(
    settings: Teacher, family: Backbone, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> OnlineTeacher | None:
    """Build the teacher of `teacher.source=online`, which decodes latents of `shape (C, h, w)` and computes in `dtype`.

    Returns None for other sources.
    """
    if settings.source != "online":
        return None
    if len(shape) == 4:
        raise UserError(
            "teacher.source=online is for images, and the latents are of clips: set teacher.source=cached (script 3)"
        )
    encoder = load_teacher(settings.model, settings.grid, settings.revision)
    if encoder.dim != settings.dim:
        raise UserError(
            f"teacher {settings.model} has width {encoder.dim}, teacher.dim says {settings.dim}: set teacher.dim={encoder.dim}"
        )
    codec = family.load_codec() if settings.decoder is None else LatentCodec(load_decoder(settings.decoder))
    if codec.channels != shape[0]:
        raise UserError(
            f"teacher.decoder {settings.decoder} decodes {codec.channels} channels, the latents have {shape[0]}"
        )
    return OnlineTeacher(codec, encoder, bf16=dtype == torch.bfloat16).to(device)


def build_model(
    settings: Model,
    align: Align,
    teacher: Teacher,
    seed: int,
    family: Backbone,
    network: nn.Module | None = None,
) -> AlignedModel:
    """Build the base model's network (or take `network`), mark the trained weights and, unless λ is 0, add alignment heads.

    `seed` draws the initial weights of LoRA and heads.
    """
    taps = align.taps if align.coeff > 0 else ()
    family.check_trained(taps, settings.train, settings.lora_targets)
    model = AlignedModel(
        family,
        family.load_network() if network is None else network,
        taps,
        teacher.dim,
        teacher_block=teacher.block if taps else None,
        head=align.head,
        head_hidden=align.head_hidden,
        train=settings.train,
        lora=family_lora(family, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
        if settings.train == "lora"
        else None,
        seed=seed,
    )
    keep_no_inputs(model.backbone)
    if settings.gradient_checkpointing:
        model.checkpoint()
    return model


def check_fit(data: Data, family: Backbone, network: nn.Module, dataset: AlignedDataset) -> None:
    """Check that the cached latents and text have the shapes that the network reads, and were made by its base model.

    Raises `UserError` where they do not fit.
    """
    base, noun = family.base, family.noun
    reads = family.text_shapes(network)
    held = dataset.text.shapes
    trimmed = {*family.trimmed_text, *family.trimmed_text.values(), *family.variable_text}
    if "max_sequence_length" in dataset.text.spec.details:
        trimmed = {*reads}
    if held.keys() != reads.keys():
        refuse(
            f"{data.text} holds the text fields {', '.join(held)}, {base} reads {', '.join(reads)}", 4, base
        )
    for name, shape in reads.items():
        if held[name] != shape and not (name in trimmed and is_shorter(name, held[name], shape)):
            refuse(
                f"{data.text} holds {name} of shape {held[name]}, the {noun} of {base} reads {shape}", 4, base
            )
    channels, wanted = dataset.latent_shape[0], family.latent_shape(network)[0]
    if channels != wanted:
        refuse(f"{data.latents} has {channels} channels, the {noun} of {base} reads {wanted}", 2, base)
    latents, text = dataset.latents.spec.source, dataset.text.spec.source
    sources = (
        ("vae", lambda: family.load("vae"), latents, 2),
        ("text_encoder", lambda: PromptEncoder(family, torch.device("cpu")).weights, text, 4),
    )
    for part, load, source, script in sources:
        # The weights are read only where the names differ: a fine-tune often shares its VAE and text encoder with its base.
        made_by = source.get("model", base)
        if made_by != base and weights_digest(load()) != source["weights_sha256"]:
            refuse(
                f"the cache was made with the {part} of {made_by}, which is not that of {base}", script, base
            )


def refuse(reason: str, script: int, base: str) -> NoReturn:
    raise UserError(f"{reason}: run script {script} with --base {base}")


def build_path(diffusion: Diffusion, family: Backbone, shape: Sequence[int]) -> Path:
    """Build the path of latents of `shape (C, …)`, with the base model's noise schedule and what its network outputs."""
    return family.path(shape, diffusion.model_dump())


def build_objective(align: Align, path: Path) -> Objective:
    """Build the training objective on a path from data to noise."""
    names = {"manifold_coeff", "manifold", "upper_only", "gather", "relation_margin", "spatial_norm"}
    neighbours = Neighbours(**align.model_dump(include={knob.name for knob in fields(Neighbours)}))
    options = align.model_dump(include=names)
    return Objective(path, align_coeff=align.coeff, neighbours=neighbours, **options)


def build_coefficient(align: Align, steps: int) -> Coefficient:
    """Build the function that gives λ at each step of the training."""
    names = {"coeff", "schedule", "warmup_steps", "decay_steps", "coeff_end", "power", "cutoff_step"}
    cutoff = None
    if align.similarity_threshold is not None:
        cutoff = SimilarityCutoff(
            align.similarity_threshold,
            ema_decay=align.similarity_ema_decay,
            mode=align.threshold_mode,
            every=align.similarity_every,
        )
    return Coefficient(CoefficientSchedule(**align.model_dump(include=names), total_steps=steps), cutoff)


def load_run_model(
    run: RunFolder, step: int, device: torch.device, *,
    weights: str = "ema", dtype: torch.dtype | None = None,
) -> AlignedModel:  # fmt: skip
    """Load a run's model in eval mode: a checkpoint's weights ("ema", "raw"), or the bare base model ("base").

    In `dtype`; None is fp32, or bf16 where it is quantised.
    """
    config = run.config
    if dtype is None:
        dtype = torch.float32 if config.model.quantize == "none" else torch.bfloat16
    network = load_network(config.model, family_for(config), dtype, device)
    settings, align = config.model, config.align
    if weights == "base":  # without LoRA and without heads
        settings, align = settings.model_copy(update={"train": "full"}), align.model_copy(update={"coeff": 0})
    model = build_model(settings, align, config.teacher, config.seed, family_for(config), network)
    if weights != "base":
        load_weights(run.checkpoint(step) / WEIGHTS[weights], model.trained_parameters())
    return model.to(device, dtype).eval().requires_grad_(False)
