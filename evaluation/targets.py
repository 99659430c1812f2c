"""What is evaluated, and by which settings: a run, one of its checkpoints, or the bare base model that a config names."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from configs.evaluation import Eval
from configs.loading import load_config, with_settings
from configs.schema import Config
from metrics.features import sha256_of
from training.checkpoint import WEIGHTS, state_of
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Target:
    """The weights of one step of a run, and the settings by which they are evaluated.

    `weights` are "ema", "raw", or "base" at step 0 for the bare base model. A base model has only one kind of weights, so it is
    compared with runs of either kind: `asked` is the kind that those runs have.
    """

    run: RunFolder
    step: int
    weights: str
    settings: Eval
    asked: str = "ema"

    @cached_property
    def config(self) -> Config:
        """The run's config, with the settings of this evaluation as its `eval`."""
        return self.run.config.model_copy(update={"eval": self.settings})

    @cached_property
    def weights_sha256(self) -> str | None:
        """sha256 of the checkpoint's file; None for the base model, whose weights are known once they are loaded."""
        if self.weights == "base":
            return None
        return sha256_of(self.run.checkpoint(self.step) / WEIGHTS[self.weights])

    @cached_property
    def images_seen(self) -> int:
        """Images that training had read by then."""
        if self.weights == "base":
            return 0
        return self.step * state_of(self.run.checkpoint(self.step))["extra"]["data"]["images_per_step"]

    @property
    def name(self) -> str:
        """The name that messages use."""
        return self.run.name if self.weights == "base" else f"{self.run.name} step {self.step}"

    def with_changes(self, changes: Mapping[str, object]) -> "Target":
        """The same weights, evaluated by other values of these dotted keys; their checksum is not computed again."""
        _ = self.weights_sha256
        other = copy.copy(self)
        vars(other)["settings"] = with_settings(self.config, dict(changes)).eval
        vars(other).pop("config", None)
        return other


def open_run(path: Path) -> tuple[RunFolder, str | None]:
    """The run of a folder, of a checkpoint's folder (whose step is returned too), or of a config's base model."""
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        return RunFolder.of_base_model(load_config(path)), None
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        step = path.name.removeprefix("step-").lstrip("0") or "0"
        return RunFolder(path.parents[1]), step
    return RunFolder(path), None


def find_targets(
    paths: Sequence[Path],
    which: str = "newest",
    *,
    raw: bool = False,
    changes: Mapping[str, object] | None = None,
    alike: bool = False,
) -> list[list[Target]]:
    """The targets of each RUN, in the order given; raises `UserError` for an absent checkpoint, or a target given twice.

    `which` is a step, "newest" or "all"; `raw` takes the raw weights instead of their moving average. `changes` {dotted key:
    value} of `eval` are laid over the run's own settings, or, to be `alike`, over those of the first run for all of them.
    """
    found, settings = [], None
    for path in paths:
        run, step = open_run(path)
        if step is not None and which not in ("newest", "all", step):
            raise UserError(f"{path} is step {step}, --checkpoint says {which}: leave one of them out")
        if settings is None or not alike:
            settings = with_settings(run.config, dict(changes or {})).eval
        found.append(_targets_of(run, step or which, "raw" if raw else "ema", settings))
    places = [(target.run.path.resolve(), target.step, target.weights) for group in found for target in group]
    if len(set(places)) != len(places):
        raise UserError("a run is given twice")
    return found


def run_labels(runs: Sequence[RunFolder], steps: Sequence[int] = ()) -> list[str]:
    """The name of each run in figures: its folder's name, or the last two names of its file path where one name is not enough.

    A run that is there twice has its step (of `steps`) behind its name. Raises `UserError` where names are still equal.
    """
    paths = [run.path.resolve() for run in runs]
    for parts in (1, 2):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    if steps:
        names = [f"{n} {s}" if names.count(n) > 1 else n for n, s in zip(names, steps, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("two of these run folders have the same name: rename one, to tell them apart")
    return names


def find_baseline(runs: Mapping[str, RunFolder], named: Path | None) -> str | None:
    """The label of the run that the others are compared with: the one named, else the only one without alignment, else none."""
    if named is not None:
        found = [label for label, run in runs.items() if run.path.resolve() == named.resolve()]
        if not found:
            raise UserError(f"--baseline {named} is none of the runs")
        return found[0]
    without = [label for label, run in runs.items() if run.config.align.coeff == 0 and not run.is_base_model]
    return without[0] if len(without) == 1 and len(runs) > 1 else None


def _targets_of(run: RunFolder, which: str, weights: str, settings: Eval) -> list[Target]:
    if run.is_base_model:
        return [Target(run, 0, "base", settings, asked=weights)]
    steps = run.checkpoint_steps()
    if not steps:
        raise UserError(f"{run.path} has no checkpoint yet: wait for the next (train.checkpoint_every)")
    named = {"all": steps, "newest": steps[-1:]} | {str(step): [step] for step in steps}
    if which not in named:
        raise UserError(f"{run.path} has no checkpoint of step {which}; it has {', '.join(map(str, steps))}")
    return [Target(run, step, weights, settings, asked=weights) for step in named[which]]
