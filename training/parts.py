"""From a config to the cache, the model and the loss: what training and evaluation build alike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from cache.batch_stream import Batch
from cache.dataset import SD15AlignedDataset
from common.device import compute_dtype, pick_device
from common.errors import UserError
from configs.schema import Config
from method.coefficient import Coefficient, CoefficientSchedule, SimilarityCutoff
from method.objective import SD15Loss
from method.paths import PREDICTION_TYPES, SCHEDULER_TYPES, NoiseSchedule
from models.aligned import SD15UNetAligned, lora_config
from models.pipeline_parts import load_part, weights_digest
from models.teachers.dinov2 import DINOv2Encoder
from models.teachers.online import OnlineTeacher, load_decoder
from training.checkpoint import WEIGHTS, load_weights, trained_file_of
from training.masters import Masters
from training.ranks import Ranks
from training.run_folder import RunFolder

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}
SPACING = "trailing"  # ends at the noisiest step, which sampling in few steps needs


@dataclass(frozen=True)
class Parts:
    """Everything that a training is made of."""

    config: Config
    ranks: Ranks
    model: SD15UNetAligned
    masters: Masters
    loss: SD15Loss
    dataset: SD15AlignedDataset
    coefficient: Coefficient
    online: OnlineTeacher | None
    device: torch.device

    def teacher_tokens(self, batch: Batch, latents: Tensor) -> Tensor:
        """The teacher's tokens `(B, N, D)` of a batch: from the cache, or made of its latents `(B, 4, h, w)`."""
        return batch.on(self.device, "dino_tokens") if self.online is None else self.online(latents)

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the U-Net have these trained weights, in eval mode; afterwards it is as it was."""
        unet = self.model.unet
        was_training = unet.training
        unet.eval()
        try:
            # Compiled for another batch, the U-Net would be compiled again.
            with self.masters.showing(values), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            unet.train(was_training)


def build_parts(config: Config) -> Parts:
    """All parts, checked against each other; raises `UserError` where they do not fit."""
    device = pick_device(config.train.device)
    dtype = compute_dtype(device, config.train.precision)
    dataset = open_cache(config)
    model = build_model(config).to(device).train()
    insist_fit(config, model.unet, dataset)
    if config.model.init_from is not None:
        start_from(config, model)
    last = config.train.channels_last
    if (device.type == "cuda" and dtype == torch.bfloat16) if last is None else last:
        model.unet.to(memory_format=torch.channels_last)
    return Parts(
        config=config,
        ranks=Ranks(cpu=device.type == "cpu"),
        model=model,
        masters=Masters(model, dtype),
        loss=build_loss(config),
        dataset=dataset,
        coefficient=build_coefficient(config),
        online=build_online_teacher(config, device, dataset.latent_channels),
        device=device,
    )


def start_from(config: Config, model: SD15UNetAligned) -> None:
    """Give the model the weights that `model.init_from` names; raises `UserError` where they would mean something else here."""
    file, weights = trained_file_of(config.model.init_from)
    if config.model.train == "lora" and (file.parents[2] / "config.yaml").exists():
        theirs = RunFolder(file.parents[2]).config.model
        if theirs.train == "lora" and theirs.lora_alpha != config.model.lora_alpha:
            raise UserError(
                f"{file} was trained with model.lora_alpha={theirs.lora_alpha:g}, which scales it: choose the same, not "
                f"{config.model.lora_alpha:g}"
            )
    model.load_trained(file, weights)
    print(f"starts from {file}")


def open_cache(config: Config) -> SD15AlignedDataset:
    """The training data, after checking that its tokens are the teacher's that the config names."""
    data = config.data
    folder = data.tokens if config.teacher.source == "cached" else None
    dataset = SD15AlignedDataset(
        data.csv, data.latents, folder, data.text, need_tokens=config.align.coeff > 0
    )
    if dataset.tokens is None:
        return dataset
    wanted = (config.teacher.grid**2, config.teacher.dim)
    if dataset.tokens.spec.shape != wanted:
        raise UserError(
            f"{data.tokens} holds tokens {dataset.tokens.spec.shape}, the config's teacher makes {wanted}: "
            "set teacher.dim and teacher.grid, or run script 3 with that teacher"
        )
    made_by = dataset.tokens.spec.source.get("model")
    if config.teacher.model not in (None, made_by):
        raise UserError(
            f"{data.tokens} was made by {made_by}, teacher.model says {config.teacher.model}: if they are the same, set "
            f"teacher.model={made_by}"
        )
    return dataset


def build_online_teacher(config: Config, device: torch.device, channels: int = 4) -> OnlineTeacher | None:
    """The teacher of `teacher.source=online` on `device`; None where tokens are cached, or λ is 0."""
    settings = config.teacher
    if settings.source == "cached" or config.align.coeff == 0:
        return None
    encoder = DINOv2Encoder.from_pretrained(settings.model, settings.grid, settings.revision)
    if encoder.dim != settings.dim:
        raise UserError(
            f"teacher {settings.model} has width {encoder.dim}, teacher.dim says {settings.dim}: set teacher.dim={encoder.dim}"
        )
    decoder = load_decoder(config.model.base, settings.decoder, config.model.revision)
    if decoder.config.latent_channels != channels:
        raise UserError(
            f"teacher.decoder {settings.decoder} decodes {decoder.config.latent_channels} channels, the latents have {channels}"
        )
    return OnlineTeacher(decoder, encoder).to(device)


def build_model(config: Config, unet: UNet2DConditionModel | None = None) -> SD15UNetAligned:
    """The base model's U-Net (or another), what is trained of it, and (unless λ is 0) its alignment heads."""
    settings = config.model
    if unet is None:
        unet = load_part(settings.base, "unet", settings.revision)
    model = SD15UNetAligned(
        unet,
        config.align.taps if config.align.coeff > 0 else (),
        config.teacher.dim,
        grid=config.teacher.grid,
        head=config.align.head,
        head_hidden=config.align.head_hidden,
        train=settings.train,
        lora_config=lora_config(settings.lora_rank, settings.lora_alpha, settings.lora_targets),
        seed=config.seed,
    )
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return model


def insist_fit(config: Config, unet: UNet2DConditionModel, dataset: SD15AlignedDataset) -> None:
    """Raise `UserError` unless the U-Net reads latents and text of the cached widths."""
    base = config.model.base
    width, channels = dataset.text.shape[-1], dataset.latent_channels
    if width != unet.config.cross_attention_dim:
        raise UserError(
            f"{config.data.text} holds text of width {width}, the U-Net of {base} reads "
            f"{unet.config.cross_attention_dim}: run script 4 with --base {base}"
        )
    cells = max(dataset.latents.spec.shape[1:]) // 2 ** (len(unet.config.block_out_channels) - 1)
    if config.align.coeff > 0 and config.teacher.grid < cells:
        raise UserError(
            f"the teacher's grid {config.teacher.grid} is coarser than the mid-block's {cells}: run script 3 with --grid "
            f"{cells} or more"
        )
    if channels != unet.config.in_channels:
        raise UserError(
            f"{config.data.latents} has {channels} channels, the U-Net of {base} reads "
            f"{unet.config.in_channels}: run script 2 with --base {base}"
        )
    for part, source, script in (
        ("vae", dataset.latents.spec.source, 2),
        ("text_encoder", dataset.text_manifest["source"], 4),
    ):
        insist_same_weights(config, part, source, script)


def insist_same_weights(config: Config, part: str, source: dict, script: int) -> None:
    """Raise `UserError` where a field was made by a model of another name whose weights differ from the base's.

    The weights are only read when the names differ: a fine-tune often shares its VAE and text encoder with its base.
    """
    base = config.model.base
    if source.get("model", base) == base:
        return
    if weights_digest(load_part(base, part, config.model.revision)) != source["weights_sha256"]:
        raise UserError(
            f"the cache was made with the {part} of {source['model']}, which is not that of {base}: run script {script} with "
            f"--base {base}"
        )


def build_loss(config: Config) -> SD15Loss:
    """The objective, with the base model's own noise schedule and output."""
    scheduler = load_part(config.model.base, "scheduler", config.model.revision)
    own = PREDICTION_TYPES.get(scheduler.config.prediction_type)
    if own is None:
        raise UserError(
            f"{config.model.base} predicts {scheduler.config.prediction_type}; epsilon or v was expected"
        )
    parameterization = config.diffusion.parameterization
    return SD15Loss(
        NoiseSchedule(scheduler.alphas_cumprod),
        prediction=config.diffusion.prediction,
        parameterization=own if parameterization == "auto" else parameterization,
        align_coeff=config.align.coeff,
        v_weight_max=config.diffusion.v_weight_max,
        snr_gamma=config.diffusion.snr_gamma,
        manifold_coeff=config.align.manifold_coeff,
        manifold=config.align.manifold,
        upper_only=config.align.upper_only,
        gather=config.align.gather,
        alpha=config.align.spatial_norm,
    )


def sampling_scheduler(config: Config, parameterization: str, sampler: str = "ddim"):
    """A sampler on the base model's noise schedule, for a network that outputs `parameterization`."""
    noise_schedule = load_part(config.model.base, "scheduler", config.model.revision).config
    return SAMPLERS[sampler].from_config(
        noise_schedule,
        clip_sample=False,  # latents are no pixels in [-1, 1]; some bases leave this to a default of True
        timestep_spacing=SPACING,
        prediction_type=SCHEDULER_TYPES[parameterization],
    )


def build_coefficient(config: Config) -> Coefficient:
    """λ at each step."""
    align = config.align
    names = ("coeff", "schedule", "warmup_steps", "decay_steps", "coeff_end", "power", "cutoff_step")
    schedule = CoefficientSchedule(
        **{name: getattr(align, name) for name in names}, total_steps=config.train.steps
    )
    if align.similarity_threshold is None:
        return Coefficient(schedule)
    return Coefficient(
        schedule,
        SimilarityCutoff(
            align.similarity_threshold,
            ema_decay=align.similarity_ema_decay,
            mode=align.threshold_mode,
            every=align.similarity_every,
        ),
    )


def load_run_model(
    run: RunFolder, step: int, device: torch.device, *, weights: str = "ema"
) -> tuple[SD15UNetAligned, str]:
    """The run's model with the weights of a checkpoint ("ema", "raw") or its bare base model ("base"), in eval mode, and what
    the network outputs."""
    model = build_model(run.config) if weights != "base" else bare_model(run.config)
    if weights != "base":
        load_weights(run.checkpoint(step) / WEIGHTS[weights], model.trained_parameters())
    return model.to(device).eval().requires_grad_(False), build_loss(run.config).parameterization


def bare_model(config: Config) -> SD15UNetAligned:
    """The base model as it was before any training: no LoRA, no heads."""
    plain = {
        "model": config.model.model_copy(update={"train": "full"}),
        "align": config.align.model_copy(update={"coeff": 0}),
    }
    return build_model(config.model_copy(update=plain))
