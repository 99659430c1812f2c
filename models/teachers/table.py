"""The kinds of teachers, and how one is loaded. A new kind is a file beside this one and a line in `TEACHERS`."""

from pathlib import Path
from typing import Literal, NotRequired

from common.errors import UserError
from common.pretrained import PixelStatistics, read_config, read_optional
from common.sides import Sides
from models.teachers.dinov2 import DINOv2Encoder
from models.teachers.dinov2_checkpoint import load_checkpoint
from models.teachers.dinov3 import DINOv3Encoder
from models.teachers.encoder import PREPARATION, TeacherEncoder
from models.teachers.siglip import SigLIPEncoder

TEACHERS: tuple[type[TeacherEncoder], ...] = (
    DINOv2Encoder,
    DINOv3Encoder,
    SigLIPEncoder,
)


class Preparation(PixelStatistics):
    """What a teacher's preprocessor_config.json must say."""

    do_normalize: NotRequired[Literal[True]]


def load_teacher(name: str, grid: Sides, revision: str | None = None) -> TeacherEncoder:
    """Load a teacher, in fp32, from a Hugging Face folder or hub id; a DINOv2 also from a file of the original repository.

    The `model_type` of config.json says of which kind it is. Raises `UserError` for anything else. A hub id looks like
    `facebook/dinov2-large`.
    """
    file, what = Path(name), f"teacher {name}"
    if file.is_file():
        if revision is not None:
            raise UserError(f"{what} is a file and has no revision: leave out the revision")
        return DINOv2Encoder(load_checkpoint(file), grid, format="facebookresearch")
    config = read_config(name, "config.json", what, revision=revision)
    found = config.get("model_type")
    if (kind := next((kind for kind in TEACHERS if found in kind.model_types), None)) is None:
        known = "; ".join(f"{kind.name}: {', '.join(kind.model_types)}" for kind in TEACHERS)
        raise UserError(f"{what} is a {found!s:.60} model; give one of a known model_type ({known})")
    statistics = read_optional(name, PREPARATION, Preparation, what, revision=revision)
    model = kind.load(config, name, what, revision).float()
    patch, channels = model.config.patch_size, model.config.num_channels
    if not isinstance(patch, int) or patch < 1:
        raise UserError(
            f"{what} has patch_size = {patch!r}; a number of pixels was expected: mend its config"
        )
    if channels != 3:
        raise UserError(f"{what} reads images of {channels} channels; 3 were expected: give another model")
    return kind(model, grid, statistics=statistics)
