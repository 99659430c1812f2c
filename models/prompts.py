"""Text fields as a pipeline makes them: its own `encode_prompt`, given what its own call gives it. No other part is loaded."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.pretrained import load_pretrained

LARGE = 10**9  # weights of a text encoder from which on it is loaded in bf16, as its authors run it
NULL = "negative_"


class PromptEncoder:
    """The text encoders and tokenizers of one base model.

    Args:
        family: a `Backbone`; `text_fields` names what its pipeline's `encode_prompt` returns.
        device: where the encoders run. On a GPU only the one that works is in its memory.

    Raises `UserError` where a part cannot be loaded, where the family's `check_text` refuses it, or where `max_sequence_length`
    is set and means nothing to the pipeline, or is more than its own.
    """

    def __init__(self, family, device: torch.device):
        self.family, self.device = family, device
        check_length(family)  # before gigabytes of encoders are loaded
        index = family.pipeline_class._get_signature_keys(family.pipeline_class)[0]
        self.parts = {name: load_text_part(family, name) for name in family.parts if is_of_text(name)}
        family.check_text(self.parts)
        others = dict.fromkeys(set(index) - set(self.parts))
        self.pipeline = load_pretrained(
            family.pipeline_class, family.base, f"pipeline {family.base}", revision=family.revision,
            **others | dict(family.load_options) | self.parts,
        )  # fmt: skip
        if device.type == "cuda":
            self.pipeline.enable_model_cpu_offload(device=device)

    @property
    def weights(self) -> nn.Module:
        """All text encoders, whose weights say what made a field."""
        return nn.ModuleDict({n: part for n, part in self.parts.items() if isinstance(part, nn.Module)})

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The fields `(n, …)` of the prompts, and those `(…)` of the null prompt of guidance, on the CPU; masks are uint8.

        Pipelines that make no negative prompt of their own take "" for it: there the second is that of the first prompt.
        """
        call = inspect.signature(self.pipeline.__call__).parameters
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        # The defaults of the call and of encode_prompt differ in some pipelines (lengths, instructions, cleaning).
        options = {name: call[name].default for name in takes if name in call}
        options |= {"prompt": list(prompts), "device": self.device, "num_images_per_prompt": 1}
        options |= {"do_classifier_free_guidance": True}
        if self.family.max_sequence_length is not None:
            options["max_sequence_length"] = self.family.max_sequence_length
        found = self.pipeline.encode_prompt(**{name: options[name] for name in takes if name in options})
        fields = {}
        for name, values in zip(self.family.text_fields, found, strict=True):
            if name:
                dim = self.family.text_batch_dim.get(name.removeprefix(NULL), 0)
                values = values.movedim(dim, 0).cpu()
                fields[name] = values.to(torch.uint8) if name.endswith("mask") else values
        text = {name: values for name, values in fields.items() if not name.startswith(NULL)}
        return text, {name: fields.get(NULL + name, rows)[0] for name, rows in text.items()}


def check_length(family) -> None:
    """Raise `UserError` where the family's `max_sequence_length` is set and cannot be."""
    wanted = family.max_sequence_length
    known = inspect.signature(family.pipeline_class.__call__).parameters.get("max_sequence_length")
    if wanted is None or (known is not None and wanted <= known.default):
        return
    limit = "takes no such length" if known is None else f"makes at most {known.default} tokens by default"
    raise UserError(f"--max-sequence-length {wanted}: {family.pipeline} {limit}; leave it out")


def is_of_text(part: str) -> bool:
    return part.startswith(("text_encoder", "tokenizer"))


def load_text_part(family, part: str):
    """A tokenizer, or a text encoder in eval mode: in fp32, or in bf16 where it has more than `LARGE` weights."""
    if part.startswith("tokenizer"):
        return family.load(part)
    what, kind = f"{part} of {family.base}", family.parts[part]()
    found = load_pretrained(kind, family.base, what, part=part, revision=family.revision, dtype="auto").eval()
    return found.to(torch.bfloat16 if sum(p.numel() for p in found.parameters()) > LARGE else torch.float32)
