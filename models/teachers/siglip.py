"""The vision towers of SigLIP and SigLIP 2 as teachers (arXiv 2303.15343, 2502.14786).

Both have one architecture and one `model_type`, "siglip". SigLIP 2's NaFlex models, of the type "siglip2", take patches instead
of images and are no teachers here.
"""

from typing import Any

import transformers
from torch import Tensor, nn

from common.pretrained import foreign_files, load_pretrained
from models.teachers.encoder import TeacherEncoder


class SigLIPEncoder(TeacherEncoder):
    """The tokens are those after the tower's `post_layernorm`; there is no CLS token, and the pooling head is not loaded."""

    name = "SigLIP"
    model_types = ("siglip", "siglip_vision_model")
    mean_and_std = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    @classmethod
    def load(cls, config: dict[str, Any], name: str, what: str, revision: str | None) -> nn.Module:
        """Load the vision tower alone, also from a folder that holds both towers."""
        tower = config.get("vision_config", {}) if config["model_type"] == "siglip" else config
        with foreign_files(what):
            tower = transformers.SiglipVisionConfig(**tower | {"vision_use_head": False})
        return load_pretrained(transformers.AutoModel, name, what, revision=revision, config=tower)

    @staticmethod
    def count_prefix(config: transformers.PretrainedConfig) -> int:
        return 0

    def hidden_states(self, pixels: Tensor) -> Tensor:
        return self.model(pixels, interpolate_pos_encoding=True).last_hidden_state

    @property
    def resampling(self) -> str:
        embeddings = self.model.embeddings
        return self.find_resampling(embeddings, embeddings.position_embedding.weight[None])  # (1, n, D)
