"""A run folder: everything one training leaves behind, and all that evaluation needs to know about it.

config.yaml       the resolved config
run.json          command, versions, device, when
metrics.jsonl     one JSON object per logged step
checkpoints/      see checkpoint.py
tensorboard/      the same metrics for TensorBoard
export/           weights for other tools, EMA and raw
samples/ eval/    what evaluate_sd15.py makes
"""

import fcntl
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.loading import load_config, resolved_yaml
from configs.schema import Config
from errors import UserError
from files import write_atomically, write_json
from training.checkpoint import checkpoints

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "lmdb")
# What may differ between the start of a run and its continuation, because it cannot change the result.
OPERATIONAL = (
    "run",
    "data.read_threads",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


class RunFolder:
    """One run's folder on disk. `RunFolder(path)` opens an existing one and raises `UserError` when there is none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.config_file.exists():
            raise UserError(f"{path} is not a run folder (no config.yaml): train_sd15.py makes one")
        self.config = load_config(self.config_file)

    @classmethod
    @contextmanager
    def claimed(cls, config: Config) -> Iterator["RunFolder"]:
        """The run of this config, its folder made when it is new, while no other process trains there.

        Raises `UserError` when the run has a checkpoint and was started with another config, or when another process holds
        the folder; its lock goes with the process, however that ends.
        """
        path = config.run
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / ".lock", "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(f"cannot write the run folder {path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training {path}: wait for it, or choose another run=…"
                ) from None
            if (path / "config.yaml").exists():
                run = cls(path)
                changed = _changed(run.config, config)
                if changed and run.newest_checkpoint():
                    raise UserError(
                        f"{path} was started with another config ({'; '.join(changed)}): choose another run=… or delete it"
                    )
            if not (path / "config.yaml").exists() or changed:
                write_json(path / "run.json", _provenance())
            # Also where only what cannot change the training differs, such as eval.*: the newest word is evaluated.
            write_atomically(path / "config.yaml", resolved_yaml(config).encode())
            yield cls(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def name(self) -> str:
        return self.path.name

    def newest_checkpoint(self) -> Path | None:
        """The finished checkpoint with the highest step, or None."""
        return (checkpoints(self.checkpoint_folder) or [None])[-1]

    def checkpoint_steps(self) -> list[int]:
        """The steps of all finished checkpoints, ascending."""
        return [int(path.name.removeprefix("step-")) for path in checkpoints(self.checkpoint_folder)]

    def settings(self) -> dict[str, object]:
        """The settings that decide the result, as dotted keys."""
        return _deciding(self.config)

    def command(self) -> str:
        """The command line that started the run."""
        return json.loads((self.path / "run.json").read_text())["command"]

    def metrics(self) -> list[dict]:
        """All logged metrics in order; an incomplete last line (a killed process) is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def forget_metrics_after(self, step: int) -> None:
        """Drop what was logged after the checkpoint a run resumes from; it will be logged again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_atomically(
            self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode()
        )

    def append_metrics(self, line: dict) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def this_command() -> str:
    """The command line of this process, as one would paste it."""
    return shlex.join(["python", *sys.argv])


def _provenance() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": this_command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def _changed(before: Config, now: Config) -> list[str]:
    """`key: before -> now` for every setting that differs and matters to the result."""
    old, new = _deciding(before), _deciding(now)
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]


def _deciding(config: Config) -> dict[str, object]:
    return {
        key: value
        for key, value in flat_settings(config).items()
        if key not in OPERATIONAL and not key.startswith("eval.")
    }


def flat_settings(config: Config) -> dict[str, object]:
    """Every setting by its dotted key."""
    return _flat(config.model_dump(mode="json"))


def _flat(data: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
