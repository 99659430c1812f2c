"""Means of what a training measures, kept on the device until they are logged."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[list[Tensor]], None]
Measured = tuple[str, Tensor, Tensor | float]  # name, sum, weight


class Means:
    """Weighted means by name since they were last read, each over the steps that had the term.

    Nothing waits for the device until `read`. A value that is a vector is a mean for each of its entries, which `read` names
    `name/1`, `name/2`, …; an entry of weight 0 is left out.
    """

    def __init__(self) -> None:
        # For each set of names that came together, with their lengths, (2, n): weighted sums, and weights. In fp64, where sums
        # of fp32 values are as good as exact, so that neither a stop nor the number of ranks shows in them.
        self._totals: dict[tuple[tuple[str, int], ...], Tensor] = {}

    def add(self, measured: Sequence[Measured], skip: Tensor | None = None) -> None:
        """Add sums and their weights, both scalars, or vectors of one length; nothing where `skip`, a scalar bool, is true."""
        names = tuple((name, total.numel()) for name, total, _ in measured)
        totals = [total.detach().reshape(-1) for _, total, _ in measured]
        weights = [
            weight.detach().reshape(-1) if isinstance(weight, Tensor) else torch.full_like(total, weight)
            for total, (_, _, weight) in zip(totals, measured, strict=True)
        ]
        pair = torch.cat([*totals, *weights]).double().view(2, -1)  # (2, n)
        if skip is not None:
            pair = torch.where(skip, 0.0, pair)
        self._totals[names] = self._totals[names] + pair if names in self._totals else pair

    def state_dict(self, reduce: Reduce | None = None) -> list:
        """All sums, over all processes where `reduce` sums a list of tensors in place, as JSON can hold them."""
        if not self._totals:
            return []
        values = torch.cat(list(self._totals.values()), dim=1)  # (2, Σn)
        if reduce is not None:
            reduce([values])
        parts = values.cpu().split([pair.shape[1] for pair in self._totals.values()], dim=1)
        return [
            [list(map(list, names)), part.tolist()] for names, part in zip(self._totals, parts, strict=True)
        ]

    def load_state_dict(self, state: list, device: torch.device, *, zero: bool = False) -> None:
        """Go on from saved sums; with `zero` from none of the same names, as all processes but one do."""
        self._totals = {}
        for names, values in state:
            pair = torch.tensor(values, dtype=torch.float64, device=device)
            self._totals[tuple(map(tuple, names))] = pair.zero_() if zero else pair

    def read(self, reduce: Reduce | None = None) -> dict[str, float]:
        """The means; the sums start anew."""
        sums: dict[str, list[float]] = {}
        for names, (totals, weights) in self.state_dict(reduce):
            entries = [
                name if size == 1 else f"{name}/{i}" for name, size in names for i in range(1, size + 1)
            ]
            for entry, total, weight in zip(entries, totals, weights, strict=True):
                before = sums.get(entry, [0.0, 0.0])
                sums[entry] = [before[0] + total, before[1] + weight]
        self._totals.clear()
        return {entry: total / weight for entry, (total, weight) in sums.items() if weight > 0}
