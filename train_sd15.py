"""Train Stable Diffusion 1.5's U-Net with U-REPA on cached latents, teacher tokens and text embeddings.

    python train_sd15.py --config configs/A.yaml
    python train_sd15.py --config configs/A.yaml align.coeff=0 run=runs/A_baseline
    python train_sd15.py --config configs/A.yaml --config configs/ablations/token_only.yaml run=runs/A_token_only
    python train_sd15.py --config configs/A.yaml --self-test    # is every part alive? Says so, and trains nothing

Settings are overridden by key=value; --help lists them all. The same command resumes a run that was stopped: on a
CPU bit for bit, on a GPU as exactly as its kernels repeat themselves.
"""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from build_sd15 import Parts, build_parts
from configs.loading import knobs_help, load_config
from configs.schema import Config
from dataset_sd15 import SD15AlignedDataset, StepSampler, seed_of
from device import autocast
from errors import run_script
from files import written_whole
from loss_sd15 import drop_captions
from models.sd15_unet_aligned import SD15UNetAligned
from selftest_sd15 import self_test
from signals import StopSignal
from training.batch_stream import BatchStream
from training.checkpoint import EMA, TRAINED, load_weights
from training.run_folder import RunFolder, this_command
from training.state import TrainingState


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{knobs_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        help="YAML file, for instance configs/A.yaml; given again, the next file is laid over the one before",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--self-test", action="store_true", help="test every part of the run and exit")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    parts = build_parts(config)
    if args.self_test:
        self_test(parts)
    else:
        train(parts)


def train(parts: Parts) -> None:
    """Train to `train.steps`, from the newest checkpoint of the run folder if there is one, and export."""
    config, model = parts.config, parts.model
    with RunFolder.claimed(config) as run:
        state = TrainingState(config, model, parts.coefficient)
        state.resume(run)
        if state.step < config.train.steps:
            self_test(parts, step=state.step)
            print(f"steps {state.step} to {config.train.steps} on {parts.device}; run folder {config.run}")
            take_steps(parts, run, state)
        if state.step == config.train.steps:
            export(run, model)
        else:
            print(f"stopped at step {state.step} of {config.train.steps}; go on with: {this_command()}")


def take_steps(parts: Parts, run: RunFolder, state: TrainingState) -> None:
    """The loop: from `state.step` to the last step, or until SIGTERM or Ctrl-C ask to stop."""
    config, dataset, coefficient, device = parts.config, parts.dataset, parts.coefficient, parts.device
    null_text = dataset.null_text.to(device, torch.float32)  # (77, 768)
    # Indexed on the device, so that text need not travel with every sample.
    class_text = dataset.text.to(device)  # (n_classes, 77, 768)
    stream = open_stream(config, dataset, first_step=state.step, pin=device.type == "cuda")
    progress = tqdm(stream, initial=state.step, total=config.train.steps, desc=run.name, unit="step")
    with (
        progress,
        SummaryWriter(run.path / "tensorboard", purge_step=state.step) as board,
        StopSignal() as stop,
    ):
        for batch in progress:
            # All randomness of a step derives from (seed, step), so that a resumed run draws what an unbroken one does.
            generator = torch.Generator(device).manual_seed(seed_of("noise", config.seed, state.step))
            coeff = coefficient(state.step)
            latents = dataset.x_0(batch.on(device, "latent"), generator)  # (B, 4, h, w)
            aligned = coefficient.needs_teacher(state.step)
            text = class_text[dataset.class_ids[batch.indices]].float()  # (B, 77, 768)
            text = drop_captions(text, null_text, config.data.caption_dropout, generator)
            with autocast(device, config.train.precision):
                tokens = parts.teacher_tokens(batch, latents) if aligned else None  # (B, N, D)
                terms = parts.loss(
                    parts.model,
                    latents,
                    tokens,
                    text,
                    generator=generator,
                    align_coeff=coeff,
                    measure=aligned,
                )
            if aligned:
                coefficient.observe(1 - terms["loss_token"])
            terms["loss"].backward()
            grad_norm = clip_grad_norm_(state.parameters.values(), config.optim.grad_clip)
            # Where no head was evaluated there is no alignment loss to average, and its 0 would pass for a perfect one.
            measured = terms if aligned else {name: terms[name] for name in ("loss", "loss_diff")}
            state.update(measured | {"grad_norm": grad_norm})

            done = state.step == config.train.steps
            if done or state.step % config.train.log_every == 0:
                log(run, board, progress, state.summary() | {"coeff": coeff} | coefficient.metrics())
            if done or stop.requested or state.step % config.train.checkpoint_every == 0:
                state.save(run)
            if stop.requested:
                break


def open_stream(config: Config, dataset: SD15AlignedDataset, *, first_step: int, pin: bool) -> BatchStream:
    """Batches from `first_step` to the last step, read ahead; their order depends on (seed, epoch) alone."""
    sampler = StepSampler(
        len(dataset),
        batch_size=config.data.batch_size,
        seed=config.seed,
        first_step=first_step,
        last_step=config.train.steps,
    )
    threads = config.data.read_threads
    return BatchStream(
        sampler, dataset.read_batch, dataset.value_bytes, dataset.decode, threads=threads, pin=pin
    )


def log(run: RunFolder, board: SummaryWriter, progress: tqdm, line: dict[str, float]) -> None:
    """One line of metrics to the run folder, TensorBoard and the progress bar."""
    run.append_metrics(line | {"it_per_s": progress.format_dict["rate"]})
    for name, value in line.items():
        board.add_scalar(name, value, line["step"])
    shown = {"loss": "loss", "align": "loss_align", "λ": "coeff"}
    progress.set_postfix({short: f"{line[name]:.4g}" for short, name in shown.items() if name in line})


def export(run: RunFolder, model: SD15UNetAligned) -> None:
    """Write raw and EMA weights of the finished run for other tools, once."""
    folder = run.path / "export"
    if not folder.exists():
        with written_whole(folder) as aside:
            for kind, file in (("raw", TRAINED), ("ema", EMA)):
                load_weights(run.newest_checkpoint() / file, model.trained_parameters())
                model.export(aside / kind)
    how = (
        f'pipe.load_lora_weights("{folder}/ema")'
        if model.trained == "lora"
        else f"U-Net folder {folder}/ema/unet"
    )
    print(f"{run.path} is complete; EMA weights for diffusers: {how}")


if __name__ == "__main__":
    run_script(main)
