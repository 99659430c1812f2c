"""What changes from step to step in a training, and how it is saved and restored."""

import math

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from configs.schema import Config
from errors import UserError
from training.checkpoint import restore_checkpoint, save_checkpoint
from training.run_folder import RunFolder


class TrainingState:
    """What changes from step to step: trained weights, optimiser, learning rates, moving average, sums of the metrics, and
    `coefficient`, anything with a `state_dict` that JSON can hold."""

    def __init__(self, config: Config, model: torch.nn.Module, coefficient):
        optim = config.optim
        self.step = 0
        self.keep = config.train.keep_checkpoints
        self.parameters = model.trained_parameters()
        self.coefficient = coefficient
        head_lr = optim.lr if optim.head_lr is None else optim.head_lr
        groups = [
            {"params": [p for name, p in self.parameters.items() if name.startswith(part)], "lr": lr}
            for part, lr in (("unet.", optim.lr), ("heads.", head_lr))
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        warmup = round(optim.warmup_fraction * config.train.steps)
        self.lr_schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, config.train.steps)
        self.ema = EMAModel(self.parameters.values(), decay=optim.ema_decay, foreach=True)
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, metrics: dict[str, torch.Tensor]) -> None:
        """One optimiser step from the gradients in place; nothing here waits for the device."""
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters.values())
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.step += 1

    def summary(self) -> dict[str, float]:
        """Means since the last summary, each over the steps that had the term, and the learning rate.

        Raises `UserError` when the loss is not finite.
        """
        means = {name: value / self.counts[name] for name, value in self.finite_sums().items()}
        self.sums.clear()
        self.counts.clear()
        return {"step": self.step, **means, "lr": self.lr_schedule.get_last_lr()[0]}

    def finite_sums(self) -> dict[str, float]:
        """The sums since the last summary, read from the device."""
        sums = {name: value.item() for name, value in self.sums.items()}
        if not all(math.isfinite(value) for value in sums.values()):
            raise UserError(
                f"loss or gradient is not finite before step {self.step}: lower optim.lr or align.coeff; "
                "the newest checkpoint is from before that"
            )
        return sums

    def save(self, run: RunFolder) -> None:
        extra = {
            "sums": self.finite_sums(),
            "counts": self.counts,
            "coefficient": self.coefficient.state_dict(),
        }
        save_checkpoint(
            run.checkpoint_folder,
            self.step,
            parameters=self.parameters,
            optimizer=self.optimizer,
            lr_schedule=self.lr_schedule,
            ema=self.ema,
            extra=extra,
            keep=self.keep,
        )

    def resume(self, run: RunFolder) -> None:
        """Continue from the run's newest checkpoint; a run without one starts at step 0."""
        newest = run.newest_checkpoint()
        if newest is not None:
            self.step, extra = restore_checkpoint(
                newest,
                parameters=self.parameters,
                optimizer=self.optimizer,
                lr_schedule=self.lr_schedule,
                ema=self.ema,
            )
            device = next(iter(self.parameters.values())).device
            self.sums = {name: torch.tensor(value, device=device) for name, value in extra["sums"].items()}
            self.counts = extra["counts"]
            self.coefficient.load_state_dict(extra["coefficient"])
        run.forget_metrics_after(self.step)
