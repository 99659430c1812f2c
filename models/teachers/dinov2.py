"""DINOv2 as a teacher, with and without registers (arXiv 2304.07193, 2309.16588)."""

from models.teachers.encoder import TeacherEncoder

# The pixel statistics DINOv2 was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DINOv2Encoder(TeacherEncoder):
    """The tokens are `x_norm_patchtokens` of the original code."""

    name = "DINOv2"
    model_types = ("dinov2", "dinov2_with_registers")
    mean_and_std = (IMAGENET_MEAN, IMAGENET_STD)
    views = ("aligned", "official")

    @property
    def normalisation(self) -> dict[str, str]:
        """Empty for ImageNet's statistics, as in the manifests written before there were other teachers."""
        return {} if self.used_mean_and_std == self.mean_and_std else super().normalisation

    @property
    def resampling(self) -> str:
        """`Dinov2Model` and `Dinov2WithRegistersModel` differ."""
        embeddings = self.model.embeddings
        return self.find_resampling(embeddings, embeddings.position_embeddings)  # (1, 1 + n, D)
