"""DINOv3's vision transformers as teachers (arXiv 2508.10104)."""

from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from models.teachers.encoder import TeacherEncoder


class DINOv3Encoder(TeacherEncoder):
    """The published statistics are those of the models trained on web images (LVD-1689M).

    The folders of the models trained on satellite images (SAT-493M) name others in their preprocessor_config.json.
    """

    name = "DINOv3"
    model_types = ("dinov3_vit",)
    mean_and_std = (IMAGENET_MEAN, IMAGENET_STD)

    @property
    def resampling(self) -> str:
        """The attention rotates queries and keys by the centres of the patches, which exist for every grid."""
        return "none (rotary positions)"
