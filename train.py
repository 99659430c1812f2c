"""Train a diffusion model with representation alignment on cached latents, teacher tokens and text embeddings.

    python train.py --config configs/A.yaml
    python train.py --config configs/A.yaml align.coeff=0 run=runs/A_baseline
    python train.py --config configs/A.yaml --config configs/ablations/token_only.yaml run=runs/A_token_only
    python train.py --config configs/A.yaml --plan         # what will it cost? Says so, and trains nothing
    python train.py --config configs/A.yaml --self-test    # is every part alive? Says so, and trains nothing
    accelerate launch --num_processes 4 train.py --config configs/A.yaml data.batch_size=12

Settings are overridden by key=value; --help lists them all. The same command resumes a run that was stopped: on a
CPU bit for bit, on a GPU as exactly as its kernels repeat themselves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from cache.batch_stream import Batch, BatchStream
from cache.order import StepSampler, seed_of
from common.arguments import Parser
from common.errors import UserError, is_lack_of_memory, is_mendable, one_line
from common.signals import StopSignal
from configs.loading import check_key, knobs_help, load_config, yaml_value
from evaluation.pictures import Previews
from evaluation.points import PeriodicEvaluation
from export import export_run
from method.alignment import similarity_of
from method.objective import PER_IMAGE
from method.paths import QUARTERS
from training.guard import Guard
from training.kernels import keep_compiled, searched_convolutions
from training.meter import Meter
from training.metric_log import MetricLog
from training.parts import Parts, build_parts
from training.plan import print_plan, step_flops
from training.ranks import run_ranks
from training.run_folder import RunFolder, this_command
from training.self_test import self_test
from training.state import TrainingState

Terms = dict[str, torch.Tensor]  # of a loss, by name
AGREE_EVERY = 10  # steps between two questions of several ranks whether to stop


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, epilog=f"settings:\n{knobs_help()}")
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        required=True,
        action="append",
        help="YAML file, for instance configs/A.yaml; given again, the next file is laid over the one before",
    )
    add("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    add("--plan", action="store_true", help="operations, memory, disk and time of the run; trains nothing")
    add("--self-test", action="store_true", help="test every part of the run and exit")
    add("--init-from", type=Path, metavar="RUN", help="start from another run's weights: model.init_from=RUN")
    add(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on with a run although this setting differs from what it was started with; can be repeated",
    )
    args = parser.parse_intermixed_args(argv)
    init = [] if args.init_from is None else [f"model.init_from={yaml_value(str(args.init_from))}"]
    for key in args.allow_change:
        check_key(key)
    config = load_config(args.config, [*args.overrides, *init])
    if args.plan:
        print_plan(config)
        return
    with explained():
        parts = build_parts(config)
        if args.self_test:
            self_test(parts)
        else:
            train(parts, args.allow_change)


def train(parts: Parts, allowed: list[str]) -> None:
    """Train to `train.steps`, from the newest checkpoint of the run folder if there is one, and export."""
    config, ranks = parts.config, parts.ranks
    with ExitStack() as claim:
        run = ranks.on_main(lambda: claim.enter_context(RunFolder.claimed(config, allowed)))
        state = TrainingState(config, parts.masters, parts.coefficient, ranks, parts.dataset.identity)
        state.resume(run)
        stream = open_stream(parts, first_step=state.step)
        if state.step < config.train.steps:
            with ranks.only_main_speaks():
                self_test(parts, step=state.step)
                print(
                    f"steps {state.step} to {config.train.steps} on {parts.device}: {state.images_per_step} images each, "
                    f"{ranks.world} process{'es' * (ranks.world > 1)}; run folder {config.run}"
                )
        ranks.on_main(run.adopt)
        if state.step < config.train.steps:
            take_steps(parts, run, state, stream)
        if state.step == config.train.steps:
            ranks.on_main(lambda: export_run(run))
        elif ranks.main:
            how = this_command() if ranks.world == 1 else "the command that started it"
            print(f"stopped at step {state.step} of {config.train.steps}; go on with: {how}")


def take_steps(parts: Parts, run: RunFolder, state: TrainingState, stream: BatchStream) -> None:
    """The loop: from `state.step` to the last step, or until SIGTERM or Ctrl-C ask to stop."""
    config, coefficient, ranks, settings = parts.config, parts.coefficient, parts.ranks, parts.config.train
    compile_backbone(parts)
    flops, done = step_flops(config)
    meter = Meter(flops, state.images_per_step, parts.device, stream, done=done)
    previews = Previews(parts) if settings.preview_every and ranks.main else None
    evaluation = PeriodicEvaluation(parts) if settings.eval_every else None
    with (
        MetricLog(run, state.step, active=ranks.main) as log,
        tqdm(
            initial=state.step, total=settings.steps, desc=run.name, unit="step", disable=not ranks.main
        ) as bar,
        closing(iter(stream)) as batches,
        StopSignal() as stop,
        searched_convolutions(),  # every step has the same shapes
    ):
        if evaluation is not None and evaluation.due(state.step):
            evaluation(run, state, log)  # a run that was stopped before it was measured
        while state.step < settings.steps:
            # All randomness of a step derives from (seed, step, rank), so that a resumed run draws what an unbroken one does.
            seed = seed_of("noise", config.seed, state.step, ranks.rank)
            generator = torch.Generator(parts.device).manual_seed(seed)
            # λ, and whether the heads are evaluated: also where a cutoff has set λ to 0 and still measures the similarity.
            coeff, heads = coefficient(state.step), coefficient.evaluates_heads(state.step)
            for _ in range(config.optim.accumulate):
                batch = next(batches)
                terms = loss_of(parts, batch, generator, coeff, heads)
                backward(parts, state, batch, terms, heads)
            state.update()
            meter.step()
            bar.update()

            done = state.step == settings.steps
            stopped = stop_agreed(parts, stop, state.step)
            measures = evaluation is not None and evaluation.due(state.step)
            saves = done or stopped or measures or state.step % settings.checkpoint_every == 0
            logs = done or state.step % settings.log_every == 0
            if saves or logs:
                report_skipped(parts, run, state)
            if logs:
                line = state.summary() | {"coeff": coeff} | coefficient.metrics() | meter.read()
                log.line(line)
                show(bar, line)
            if saves:
                with meter.paused():
                    state.save(run)
            if previews is not None and (done or state.step % settings.preview_every == 0):
                with meter.paused():
                    draw_preview(previews, run, state, log)
            if measures and not stopped:
                with meter.paused():
                    evaluation(run, state, log)
            if stopped:
                break


def loss_of(parts: Parts, batch: Batch, generator: torch.Generator, coeff: float, heads: bool) -> Terms:
    """The terms of a batch's loss (`Objective`), at λ = `coeff`; `heads` says whether the heads are evaluated."""
    with_tokens = heads and parts.model.teacher_block is None
    ready = parts.batches(batch, generator, with_tokens=with_tokens)
    return parts.loss(
        parts.model,
        ready.x_0,
        ready.tokens,
        ready.text,
        grid=ready.grid,
        generator=generator,
        align_coeff=coeff,
        measure=heads,
    )


def backward(parts: Parts, state: TrainingState, batch: Batch, terms: Terms, heads: bool) -> None:
    """Gradients of a batch, and what is learnt from its terms."""
    errors, timesteps = (terms[name] for name in PER_IMAGE)  # (B,) each
    # Where no head was evaluated there is no alignment loss to average, and its 0 would pass for a perfect one.
    logged = terms.keys() - set(PER_IMAGE) if heads else {"loss", "loss_diff"}
    scalars = {name: value for name, value in terms.items() if name in logged}
    if heads:
        # Before backward: the next step reads the similarity, and would wait for all that was launched before it.
        parts.coefficient.observe(similarity_of(terms))
    state.backward(scalars, batch.indices, errors)
    quarter = parts.loss.path.quarter(timesteps)  # (B,)
    in_quarter = quarter == torch.arange(QUARTERS, device=quarter.device)[:, None]  # (4, B)
    state.measure("loss_diff_by_quarter", torch.where(in_quarter, errors, 0).sum(1), in_quarter.sum(1))


def open_stream(parts: Parts, *, first_step: int) -> BatchStream:
    """Batches from `first_step` to the last step, read ahead; their order depends on (seed, epoch) alone."""
    config, dataset, ranks = parts.config, parts.dataset, parts.ranks
    sampler = StepSampler(
        len(dataset),
        batch_size=config.data.batch_size,
        seed=config.seed,
        first_step=first_step,
        last_step=config.train.steps,
        accumulate=config.optim.accumulate,
        ranks=(ranks.rank, ranks.world),
    )
    return BatchStream(
        sampler,
        dataset.read_batch,
        dataset.value_bytes,
        dataset.decode,
        threads=config.data.read_threads,
        pin=parts.device.type == "cuda",
    )


def compile_backbone(parts: Parts) -> None:
    """Compile the network if that is asked for, or by default on a GPU."""
    mode = parts.config.train.compile
    if mode == "auto":
        mode = "default" if parts.device.type == "cuda" else "none"
    if mode != "none":
        keep_compiled()
        parts.model.compile_backbone(mode)


def stop_agreed(parts: Parts, stop: StopSignal, step: int) -> bool:
    """Whether to stop after this step; several ranks ask each other now and then, because asking waits for the device."""
    if parts.ranks.world == 1:
        return stop.requested
    return step % AGREE_EVERY == 0 and parts.ranks.any(stop.requested, parts.device)


def report_skipped(parts: Parts, run: RunFolder, state: TrainingState) -> None:
    """Write the steps without a finite gradient, with the images to blame, to the run; raises `UserError` for too many."""
    ids, reports = parts.dataset.ids, state.guard.report()
    for report in reports:
        report |= {key: [ids[i] for i in report[key]] for key in ("images", "broken")}
    if reports:  # the gradient is that of all ranks: each has something to report, or none
        reports = parts.ranks.gather(reports)
    for line in Guard.merged(reports) if parts.ranks.main else ():
        run.skipped.append(line)
        tqdm.write(f"step {line['step']} was skipped: its gradient is not finite; see {run.skipped.path}")
    state.guard.check(run.skipped.path)


def draw_preview(previews: Previews, run: RunFolder, state: TrainingState, log: MetricLog) -> None:
    """A preview that cannot be drawn is no reason to end a training."""
    try:
        log.picture("preview", previews.draw(run.path / "previews", state), state.step)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if not is_mendable(error):
            raise
        tqdm.write(f"warning: no preview of step {state.step}: {one_line(error):.300}")


def show(bar: tqdm, line: dict[str, float]) -> None:
    """The progress bar's few numbers."""
    shown = {"loss": "loss", "align": "loss_align", "λ": "coeff", "MFU": "mfu"}
    bar.set_postfix({short: f"{line[name]:.4g}" for short, name in shown.items() if name in line})


@contextmanager
def explained() -> Iterator[None]:
    """Turn what the machine lacks, memory or a compiler, into one line that says what to do."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:  # has no public name
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UserError(f"torch.compile failed ({reason}): train.compile=none does without") from error
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise UserError(
            "out of memory: lower data.batch_size and raise optim.accumulate, or set model.gradient_checkpointing=true; "
            "--plan says what fits. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True wastes less of a GPU"
        ) from None


if __name__ == "__main__":
    run_ranks(main)
