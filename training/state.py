"""The state of a training, which changes at each step, and how it is saved and restored."""

from collections.abc import Sequence

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler

from common.errors import UserError
from configs.schema import Config
from models.aligned import BACKBONE, HEADS
from training.checkpoint import newest_whole, restore_checkpoint, save_checkpoint
from training.gradient_mean import GradientMean
from training.guard import Guard
from training.masters import Masters
from training.meter import Means, Measured
from training.optimizers import build_optimizer, step_unless
from training.ranks import Ranks
from training.run_folder import RunFolder


class TrainingState:
    """Holds everything in a training that changes from step to step, and takes its steps.

    These are the trained weights, the optimiser, the learning rates, the moving average, the means of the metrics, the counts
    of skipped steps, and `coefficient`, an object whose `state_dict` JSON can hold. `images` identifies the images that the
    training uses (`AlignedDataset.identity`).
    """

    def __init__(self, config: Config, masters: Masters, coefficient, ranks: Ranks, images: dict):
        optim = config.optim
        self.step = 0
        self.config, self.masters, self.coefficient, self.ranks = config, masters, coefficient, ranks
        self.data = images | {"images_per_step": self.images_per_step}
        self.parameters = masters.parameters
        self.device = next(iter(self.parameters.values())).device
        head_lr = optim.lr if optim.head_lr is None else optim.head_lr
        groups = [
            {"params": [p for name, p in self.parameters.items() if name.startswith(part)], "lr": lr}
            for part, lr in ((BACKBONE, optim.lr), (HEADS, head_lr))
        ]
        self.optimizer = build_optimizer(
            optim.name, groups, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.lr_schedule = self._lr_schedule_from(0)
        self.ema = EMAModel(self.parameters.values(), decay=optim.ema_decay, foreach=True)
        self.gradient_mean = GradientMean(ranks, masters)
        self.means = Means()
        self.guard = Guard(config.train.max_skipped)
        self._measured: list[Measured] = []  # measured in this step
        self._losses: list[Tensor] = []
        self._images: list[int] = []
        self._errors: list[Tensor] = []

    def backward(self, terms: dict[str, Tensor], images: Sequence[int], errors: Tensor) -> None:
        """Add the gradients of a batch to those of the step.

        They are those of `terms["loss"]`, divided by the number of batches in a step. All `terms` are logged. `errors (B,)` are
        the diffusion losses of the batch, and `images` are the indices of its images in the dataset.
        """
        batches = self.config.optim.accumulate
        if len(self._losses) + 1 == batches:
            self.gradient_mean.start()
        (terms["loss"] / batches).backward()
        self.masters.collect()
        self._measured += [(name, value, 1.0) for name, value in terms.items()]
        self._losses.append(terms["loss"].detach())
        self._images += images
        self._errors.append(errors)

    def measure(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Log the mean `total / weight` beside the terms of the loss; vectors give one mean per entry (see `Means`)."""
        self._measured.append((name, total, weight))

    def update(self) -> None:
        """Take an optimiser step with the collected gradients, and skip it where they are not finite.

        Nothing here waits for the device, except for some optimisers outside the table (see `step_unless`).
        """
        parameters = list(self.parameters.values())
        self.gradient_mean.finish()
        grad_norm = clip_grad_norm_(parameters, self.config.optim.grad_clip)
        loss = torch.stack(self._losses).mean()
        skip = self.guard.judge(self.step + 1, grad_norm, loss, self._images, torch.cat(self._errors))
        step_unless(skip, self.optimizer)
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()
        average_step(self.ema, parameters)
        self.means.add([*self._measured, ("grad_norm", grad_norm, 1.0)], skip)
        self._measured, self._losses, self._images, self._errors = [], [], [], []
        self.step += 1

    def summary(self) -> dict[str, float]:
        """Return the learning rates, and the means over all ranks since the last summary.

        Each mean is taken over the steps that measured its term.
        """
        means = self.means.read(self.ranks.sum)
        rates = dict(zip(("lr", "lr_heads"), map(float, self.lr_schedule.get_last_lr()), strict=False))
        skipped = {"skipped": self.guard.skipped} if self.guard.skipped else {}
        return {"step": self.step, **means, **rates, **skipped}

    def save(self, run: RunFolder) -> None:
        """Write a checkpoint on the first rank; raises `UserError` where it cannot be written."""
        extra = {
            "data": self.data,
            "means": self.means.state_dict(self.ranks.sum),
            "guard": self.guard.state_dict(),
            "coefficient": self.coefficient.state_dict(),
        }
        keep, keep_every = self.config.train.keep_checkpoints, self.config.train.keep_every
        self.ranks.on_main(
            lambda: save_checkpoint(run.checkpoint_folder, self, extra, keep=keep, keep_every=keep_every)
        )

    def resume(self, run: RunFolder) -> None:
        """Continue from the run's newest whole checkpoint; a run without one starts at step 0.

        Raises `UserError` where the checkpoint is beyond the last step, where its steps took another number of images, or where
        it was trained on other images.
        """
        newest = self.ranks.on_main(lambda: newest_whole(run.checkpoint_folder))
        if newest is not None:
            extra = restore_checkpoint(newest, self)
            run.check_same_data(extra["data"], self.data, self.ranks.world)
            if self.step > (steps := self.config.train.steps):
                raise UserError(
                    f"{run.path} is at step {self.step} already, beyond train.steps={steps}: choose more"
                )
            self.lr_schedule = self._lr_schedule_from(self.step)
            self.masters.publish()
            self.means.load_state_dict(extra["means"], self.device, zero=not self.ranks.main)
            self.guard.load_state_dict(extra["guard"])
            self.coefficient.load_state_dict(extra["coefficient"])
        self.ranks.on_main(lambda: run.forget_after(self.step))

    def _lr_schedule_from(self, step: int) -> LRScheduler:
        """Return the schedule of the learning rate (warm-up and cosine decay) at `step`.

        It follows from config and step, so that checkpoints need not hold it.
        """
        steps = self.config.train.steps
        warmup = round(self.config.optim.warmup_fraction * steps)
        return get_cosine_schedule_with_warmup(self.optimizer, warmup, steps, last_epoch=step - 1)

    @property
    def images_per_step(self) -> int:
        return self.config.data.batch_size * self.config.optim.accumulate * self.ranks.world


@torch.no_grad()
def average_step(ema: EMAModel, parameters: list[Tensor]) -> None:
    """`EMAModel.step` without its copy of all weights, and with the same bits.

    It computes s − w (s − p); lerp computes s + w (p − s), which rounds alike, but from w = 0.5 on p − (1 − w) (p − s), which
    does not. So the first eight steps, in which the average hardly remembers, are left to `EMAModel`.
    """
    decay = ema.get_decay(ema.optimization_step + 1)
    if decay <= 0.5:
        ema.step(parameters)
        return
    ema.optimization_step += 1
    ema.cur_decay_value = decay
    torch._foreach_lerp_(ema.shadow_params, parameters, 1 - decay)
