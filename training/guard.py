"""Skip and count steps whose gradient is not finite, and find the images that caused them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError


class Guard:
    """Checks the gradient norm of each step without waiting for the device.

    `judge` decides on the device whether a step is skipped. The host reads these decisions when `report` is called, at the
    latest before the next checkpoint. Reading late does no harm, because a skipped step has changed no weight.
    """

    def __init__(self, limit: int):
        self.limit = limit  # of skipped steps in a row
        self.in_a_row = 0
        self.skipped = 0
        self._seen: list[tuple[int, list[int], Tensor, Tensor, Tensor]] = []

    def judge(
        self, step: int, grad_norm: Tensor, loss: Tensor, indices: Sequence[int], errors: Tensor
    ) -> Tensor:
        """Return whether to skip `step`, as a scalar bool on the device; `errors (n,)` are the images' diffusion losses."""
        skip = ~grad_norm.isfinite()
        self._seen.append((step, list(indices), skip, loss.detach().isfinite(), errors.detach().isfinite()))
        return skip

    def report(self) -> list[dict]:
        """Return one dict for each step that this rank skipped since the last report, and update the counts of skipped steps.

        `step` is the step and `loss_finite` says whether its loss was finite. `images` are all images of the step, and `broken`
        are those whose diffusion loss was not finite.
        """
        if not self._seen:
            return []
        skips = torch.stack([skip for _, _, skip, _, _ in self._seen]).tolist()
        found = []
        for (step, indices, _, loss, finite), skip in zip(self._seen, skips, strict=True):
            self.in_a_row = self.in_a_row + 1 if skip else 0
            if not skip:
                continue
            self.skipped += 1
            broken = [i for i, fine in zip(indices, finite.tolist(), strict=True) if not fine]
            found.append({"step": step, "loss_finite": bool(loss), "images": indices, "broken": broken})
        self._seen.clear()
        return found

    def check(self, log: Path) -> None:
        """Raise `UserError` when too many steps in a row were skipped."""
        if self.in_a_row >= self.limit:
            raise UserError(
                f"the last {self.in_a_row} steps had a loss or gradient that is not finite, and changed nothing: lower "
                f"optim.lr or align.coeff, or look at the images in {log}; the newest checkpoint is good"
            )

    @staticmethod
    def merged(reports: Sequence[dict]) -> list[dict]:
        """Merge the reports of all ranks into one line per step, with the broken images of all ranks.

        Where no rank found a broken image, the line lists all images of the step.
        """
        lines = []
        for step in sorted({report["step"] for report in reports}):
            parts = [report for report in reports if report["step"] == step]
            images = [image for part in parts for image in part["images"]]
            broken = [image for part in parts for image in part["broken"]]
            finite = all(part["loss_finite"] for part in parts)
            lines.append({"step": step, "loss_finite": finite, "images": broken or images})
        return lines

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
