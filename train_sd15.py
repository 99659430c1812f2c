"""Train Stable Diffusion 1.5's U-Net with U-REPA on cached latents, teacher tokens and text embeddings.

    python train_sd15.py --config configs/A.yaml
    python train_sd15.py --config configs/A.yaml align.coeff=0 run=runs/A_baseline

Settings are overridden by key=value; --help lists them all. The same command resumes a run that was stopped: on a
CPU bit for bit, on a GPU as exactly as its kernels repeat themselves.
"""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from build_sd15 import build_loss, build_model, coefficient_schedule, insist_fit, open_cache
from configs.loading import knobs_help, load_config
from configs.schema import Config
from dataset_sd15 import SD15AlignedDataset, StepSampler, seed_of
from device import autocast, pick_device
from errors import run_script
from files import written_whole
from loss_sd15 import drop_captions
from models.sd15_unet_aligned import SD15UNetAligned
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
    parser.add_argument("--config", required=True, help="YAML file, for instance configs/A.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    args = parser.parse_args(argv)
    train(load_config(args.config, args.overrides))


def train(config: Config) -> None:
    """Train to `config.train.steps`, from the newest checkpoint of the run folder if there is one, and export."""
    device = pick_device(config.train.device)
    dataset = open_cache(config)
    model = build_model(config).to(device).train()
    insist_fit(config, model.unet, dataset)
    loss_terms = build_loss(config)
    with RunFolder.claimed(config) as run:
        state = TrainingState(config, model)
        state.resume(run)
        announce(config, model, dataset, device, state)
        if state.step < config.train.steps:
            take_steps(config, run, state, model, loss_terms, dataset, device)
        if state.step == config.train.steps:
            export(run, model)
        else:
            print(f"stopped at step {state.step} of {config.train.steps}; go on with: {this_command()}")


def take_steps(config, run, state, model, loss_terms, dataset, device) -> None:
    """The loop: from `state.step` to the last step, or until SIGTERM or Ctrl-C ask to stop."""
    coefficient = coefficient_schedule(config)
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
            tokens = batch.on(device, "dino_tokens") if coeff > 0 else None  # (B, N, D)
            text = class_text[dataset.class_ids[batch.indices]].float()  # (B, 77, 768)
            text = drop_captions(text, null_text, config.data.caption_dropout, generator)
            with autocast(device, config.train.precision):
                terms = loss_terms(model, latents, tokens, text, generator=generator, align_coeff=coeff)
            terms["loss"].backward()
            grad_norm = clip_grad_norm_(state.parameters.values(), config.optim.grad_clip)
            state.update(terms, grad_norm)

            done = state.step == config.train.steps
            if done or state.step % config.train.log_every == 0:
                log(run, board, progress, state.summary() | {"coeff": coeff})
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


def announce(
    config: Config, model: SD15UNetAligned, dataset: SD15AlignedDataset, device, state: TrainingState
) -> None:
    """Say what is about to be trained, on what, from where."""
    count = {
        part: sum(p.numel() for n, p in state.parameters.items() if n.startswith(part))
        for part in ("unet.", "heads.")
    }
    all_weights = sum(p.numel() for p in model.unet.parameters())
    left_out = f" ({dataset.left_out} of the CSV are not cached)" if dataset.left_out else ""
    print(
        f"data     {len(dataset):,} images{left_out}, latents {dataset.latents.spec.shape}, tokens {dataset.tokens.spec.shape}"
    )
    print(f"train    {config.model.train}: {count['unet.']:,} of {all_weights:,} U-Net weights")
    if model.heads:
        align = config.align
        print(
            f"align    taps {', '.join(model.heads)}; λ = {align.coeff}, w = {align.manifold_coeff} ({align.manifold} Gram); "
            f"heads {count['heads.']:,} weights"
        )
    else:
        print("align    λ = 0: baseline, no taps and no heads")
    print(
        f"steps    {state.step} to {config.train.steps} at batch {config.data.batch_size} on {device}; run folder {config.run}"
    )


def log(run: RunFolder, board: SummaryWriter, progress: tqdm, line: dict[str, float]) -> None:
    """One line of metrics to the run folder, TensorBoard and the progress bar."""
    run.append_metrics(line | {"it_per_s": progress.format_dict["rate"]})
    for name, value in line.items():
        board.add_scalar(name, value, line["step"])
    progress.set_postfix(loss=f"{line['loss']:.4f}", align=f"{line['loss_align']:.4f}")


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
