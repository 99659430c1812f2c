"""Log metrics and pictures of a training to the run folder, to TensorBoard and, if asked, to Weights & Biases."""

import uuid
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from common.errors import UserError
from common.files import write_atomically
from configs.loading import resolved_yaml
from training.run_folder import RunFolder


class MetricLog(AbstractContextManager):
    """Writes the logs of a run, which a `with` closes. With `active=False`, on all ranks but the first, it writes nothing."""

    def __init__(self, run: RunFolder, step: int, *, active: bool):
        self.run, self._active = run, active
        if active:
            self._board = SummaryWriter(run.path / "tensorboard", purge_step=step + 1)
            self._wandb = _join_wandb(run) if run.config.train.wandb else None

    def __exit__(self, *_) -> None:
        if self._active:
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()

    def line(self, line: dict[str, float]) -> None:
        """Log one line of metrics, of which `step` is one: to metrics.jsonl, TensorBoard and Weights & Biases."""
        if not self._active:
            return
        self.run.log.append(line)
        self.scalars(line, line["step"])

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log values to TensorBoard and Weights & Biases, but not to metrics.jsonl."""
        if not self._active:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log the picture in the file `path`."""
        if not self._active:
            return
        self._board.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)


def _join_wandb(run: RunFolder):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.wandb needs Weights & Biases: pip install wandb, or leave train.wandb out"
        ) from None
    # The id is made once and kept in the run's folder: a resumed run keeps it, and no other run has the same.
    file = run.path / "wandb_id"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex.encode())
    return wandb.init(
        project=run.config.train.wandb,
        name=run.name,
        id=file.read_text(),
        dir=str(run.path),
        resume="allow",
        config={"yaml": resolved_yaml(run.config)},
    )
