"""The run folder, which holds everything that a training writes, and all that evaluation needs to know about the run.

config.yaml       the resolved config
run.json          command, versions and start time; settings that were changed when the run was resumed
metrics.jsonl     one JSON object per logged step
skipped.jsonl     steps whose loss or gradient was not finite, and the images that caused it
checkpoints/      see checkpoint.py
previews/         grids of samples that the moving average made during training
tensorboard/      the same metrics for TensorBoard
export/           weights for other tools, EMA and raw, and from which checkpoint they were made
samples/ eval/    samples and results, which evaluate.py writes
"""

import fcntl
import functools
import operator
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator

from common.errors import UserError
from common.files import open_lock, write_atomically, write_json
from common.reading import JsonLines, JsonRecord, read_record
from configs.loading import knobs, load_config, resolved_yaml, yaml_value
from configs.schema import Config
from training.checkpoint import checkpoints, step_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "lmdb")
# Settings that may differ when a run is resumed, because they cannot change its result.
OPERATIONAL = (
    "run",
    "data.read_threads",
    "data.text_on_device",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_skipped",
    "train.preview_every",
    "train.preview_images",
    "train.preview_prompts",
    "train.eval_every",
    "train.wandb",
)
# Evaluation's points, and those that were measured of weights which the run has since forgotten.
POINTS, FORGOTTEN = Path("eval/points.jsonl"), Path("eval/forgotten_points.jsonl")


class Change(JsonRecord):
    """Settings that were changed when a run was resumed."""

    from_step: int
    command: str
    changed: list[str]


class RunRecord(JsonRecord):
    """run.json."""

    command: str
    started: str
    versions: dict[str, str | None]
    base_model: NotRequired[str]  # of a folder that holds results of a bare base model
    changes: NotRequired[list[Change]]


class Skipped(JsonRecord):
    """A line of skipped.jsonl; `images` are ids."""

    step: int
    loss_finite: bool
    images: list[str]


def _has_a_step(line: dict) -> dict:
    if not isinstance(line.get("step"), int):
        raise ValueError("'step' is missing")
    return line


# A line of metrics.jsonl: its step and whatever was measured; and any line of which only the step counts here.
MetricsLine = Annotated[dict[str, int | float | None], AfterValidator(_has_a_step)]
StepLine = Annotated[dict[str, Any], AfterValidator(_has_a_step)]


class RunFolder:
    """One run's folder on disk. `RunFolder(path)` opens an existing one and raises `UserError` when there is none."""

    def __init__(self, path: str | Path, config: Config | None = None, allowed: Sequence[str] = ()):
        self.path, self.name, self._allowed = Path(path), Path(path).name, allowed
        self.config_file, self._record_file = self.path / "config.yaml", self.path / "run.json"
        self.checkpoint_folder = self.path / "checkpoints"
        self.log = JsonLines(self.path / "metrics.jsonl", MetricsLine, None)
        self.skipped = JsonLines(self.path / "skipped.jsonl", Skipped, None)
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise UserError(
                f"{path} has bytes that are no UTF-8 in its name: rename it, records cannot hold it"
            )
        self._forced: list[str] = []  # changes that were allowed but are not settings, such as other images
        if config is None and not self.config_file.exists():
            raise UserError(f"{path} is not a run folder (no config.yaml): train.py makes one")
        self.config = load_config(self.config_file) if config is None else config

    @classmethod
    @contextmanager
    def claimed(cls, config: Config, allowed: Sequence[str] = ()) -> Iterator["RunFolder"]:
        """Lock the run folder of this config, creating it when it is new, and yield the run.

        Apart from the lock file, nothing is written before `adopt`. Raises `UserError` when another process holds the lock, or
        when the run has a checkpoint and was started with another config, unless every setting that differs is in `allowed`, a
        list of dotted keys. The operating system releases the lock when the process ends, even if it is killed.
        """
        path = config.run
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open_lock(path / ".lock")
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {path} ({error.strerror}): choose another run=…"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training {path}: wait for it, or choose another run=…"
                ) from None
            run = cls(path, config, allowed)
            if run.checkpoint_folder.exists() and not run.checkpoint_folder.is_dir():
                raise UserError(f"{run.checkpoint_folder} is no folder: move it away")
            if not run.config_file.exists() and run.newest_checkpoint() is not None:
                raise UserError(
                    f"{path} has checkpoints and no config.yaml: put it back, or choose another run=…"
                )
            changed = run.changed_settings()
            if run.newest_checkpoint() is not None and (refused := sorted(changed.keys() - set(allowed))):
                raise UserError(
                    f"{path} was started with another config ({'; '.join(changed[key] for key in refused)}): choose "
                    f"another run=…, or go on with it by {' '.join(f'--allow-change {key}' for key in refused)}"
                )
            yield run

    @classmethod
    def of_base_model(cls, config: Config) -> "RunFolder":
        """Create the folder for results of the bare base model that a config names: RUN_base, which has no checkpoints."""
        config = config.model_copy(update={"run": config.run.with_name(f"{config.run.name}_base")})
        run = cls(config.run, config)
        if not run.is_base_model:
            if run.config_file.exists():
                raise UserError(f"{run.path} is a run; the base model's results would go there: rename it")
            write_json(run._record_file, _provenance() | {"base_model": config.model.base})
        write_atomically(run.config_file, resolved_yaml(config).encode())
        return run

    @property
    def is_base_model(self) -> bool:
        """Whether this folder holds results of a bare base model (see `of_base_model`)."""
        return self._record_file.exists() and "base_model" in self._record()

    def _record(self) -> RunRecord:
        return read_record(self._record_file, RunRecord, "remove it, the next training writes it again")

    def adopt(self) -> None:
        """Write config.yaml, and the changed settings to run.json; call it once the run is known to go on with this config."""
        changes = [*self.changed_settings().values(), *self._forced]
        newest = self.newest_checkpoint()
        if not self._record_file.exists() or (changes and newest is None):
            write_json(self._record_file, _provenance())
        elif changes:
            record = self._record()
            note = {"from_step": step_of(newest), "command": this_command(), "changed": changes}
            write_json(self._record_file, record | {"changes": [*record.get("changes", ()), note]})
        # Write it also where only settings differ that cannot change the training, such as eval.*: evaluation uses the newest.
        write_atomically(self.config_file, resolved_yaml(self.config).encode())

    def changed_settings(self) -> dict[str, str]:
        """Return `{key: "key: before -> now"}` for each setting that affects the result and differs from config.yaml."""
        if not self.config_file.exists():
            return {}
        old, new = RunFolder(self.path).settings(), self.settings()
        return {
            key: f"{key}: {yaml_value(old.get(key))} -> {yaml_value(new[key])}"
            for key in new
            if old.get(key) != new[key]
        }

    def checkpoint(self, step: int) -> Path:
        return self.checkpoint_folder / f"step-{step:07d}"

    def newest_checkpoint(self) -> Path | None:
        """Return the finished checkpoint with the highest step, or None."""
        return (checkpoints(self.checkpoint_folder) or [None])[-1]

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, in ascending order."""
        return [step_of(path) for path in checkpoints(self.checkpoint_folder)]

    def check_same_data(self, before: dict, now: dict, ranks: int) -> None:
        """Check that the data and the images per step have not changed since the checkpoint.

        Raises `UserError` when they have; other images are accepted where a change of `data.csv` is allowed.
        """
        if (old := before["images_per_step"]) != (new := now["images_per_step"]):
            raise UserError(
                f"{self.path} took {old} images a step, now it would be {new} on {ranks} process(es): choose "
                f"data.batch_size, optim.accumulate and the number of processes so that their product is {old}"
            )
        if before == now:
            return
        what = f"{before['images']} images, now there are {now['images']}, or others"
        if "data.csv" not in self._allowed:
            raise UserError(
                f"{self.path} was trained on {what} (data.csv, or what is cached of it, has changed): restore them, choose "
                "another run=…, or go on with it by --allow-change data.csv"
            )
        self._forced.append(f"data: {what}")

    def settings(self) -> dict[str, object]:
        """Return the settings that affect the result, by dotted key."""
        settings = flat_settings(self.config)
        return {k: v for k, v in settings.items() if k not in OPERATIONAL and not k.startswith("eval.")}

    def commands(self) -> list[str]:
        """Return the command line that started the run and those that changed its settings later."""
        record = self._record()
        return [record["command"], *(change["command"] for change in record.get("changes", ()))]

    def metrics(self) -> list[MetricsLine]:
        """Return the lines of metrics.jsonl."""
        return self.log.read()

    def forget_after(self, step: int) -> None:
        """Take out of the logs what follows the step from which a run resumes, and will be logged again.

        Evaluated points are not deleted: they go to another file, and a printed line says so.
        """

        def stays(line) -> bool:
            return line["step"] <= step

        self.log.split(stays)
        self.skipped.split(stays)
        points = JsonLines(self.path / POINTS, StepLine)
        if gone := points.split(stays, into=self.path / FORGOTTEN):
            print(
                f"warning: {gone} points of {points.path} were measured after step {step}, from which the run goes on: "
                f"they are in {FORGOTTEN.name} now"
            )


def this_command() -> str:
    """Return the command line of this process, as one would paste it in the repository."""
    script, *arguments = sys.argv
    path = Path(script).resolve()
    own = path.relative_to(ROOT) if path.is_relative_to(ROOT) else script
    return shlex.join(["python", str(own), *arguments])


def _provenance() -> dict:
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": this_command(), "started": started, "versions": versions}


def flat_settings(config: Config) -> dict[str, object]:
    """Return every setting of a config by its dotted key."""
    data = config.model_dump(mode="json")
    return {key: functools.reduce(operator.getitem, key.split("."), data) for key in knobs()}
