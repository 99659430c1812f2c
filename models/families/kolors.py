"""Kolors: the U-Net of Stable Diffusion XL, with the text of a large language model, ChatGLM."""

from collections.abc import Mapping

from torch import nn

from models.families.sdxl import SDXL

TOKENS = 256  # of a prompt


def chatglm(name: str) -> type:
    """One of diffusers' classes of ChatGLM; they need the package sentencepiece, and so are imported when asked for."""
    from diffusers.pipelines import kolors

    return getattr(kolors, name)


class Kolors(SDXL):
    """Kolors of Kwai: text of 256 tokens, 1,100 noise levels."""

    name = "Kolors"
    tags = ("kolors", "u-repa")
    pipeline = "KolorsPipeline"
    default_base = "Kwai-Kolors/Kolors-diffusers"
    assumed_config = SDXL.assumed_config | {
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    }
    kohya_base = None
    parts = {
        name: kind for name, kind in SDXL.parts.items() if "text" not in name and "token" not in name
    } | {
        "text_encoder": lambda: chatglm("ChatGLMModel"),
        "tokenizer": lambda: chatglm("ChatGLMTokenizer"),
    }

    def check_text(self, parts: Mapping[str, object]) -> None:
        """ChatGLM's tokenizer takes prompts of any length; the pipeline cuts them."""

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        shapes = super().text_shapes(network)
        return shapes | {"prompt_embeds": (TOKENS, network.config.encoder_hid_dim)}
