"""The demo's tokenizer and text encoder: CLIP's classes in small sizes, which tell the class names apart."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.models import fit

PROMPTS = ("a photo of a {}", "a photo of the {}", "a picture of a {}", "a drawing of a {}", "the {}", "{}")


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer that can encode every byte, and that encodes each of `words` in few tokens.

    The vocabulary has CLIP's order: the 256 bytes, the 256 bytes at the end of a word, the merges, and the two
    special tokens.
    """
    byte_level = _byte_alphabet()
    merges: dict[tuple[str, str], str] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        joined = pieces[0]
        for piece in pieces[1:]:
            merges.setdefault((joined, piece), joined + piece)
            joined += piece
    tokens = [*byte_level, *(c + "</w>" for c in byte_level), *merges.values()]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), model_max_length=77
    )


def _byte_alphabet() -> list[str]:
    """Return the printable character of each byte in byte-level BPE (GPT-2's table), in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def train_text_encoder(
    tokenizer: CLIPTokenizer, names: list[str], steps: int, peak_lr: float = 3e-3
) -> CLIPTextModel:
    """Train a small CLIP text encoder to give similar embeddings to prompts of one class, and other ones to others.

    The loss is contrastive (InfoNCE) between two wordings of each class. The empty prompt, which guidance uses, is a
    class of its own.
    """
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    wordings = [tokenize(tokenizer, [p.format(n) for n in names] + [""]) for p in PROMPTS]
    ids = torch.stack(wordings)  # (P, K + 1, 77)
    classes = torch.arange(len(names) + 1)

    def loss(_: Tensor) -> Tensor:
        one, other = (torch.randint(len(PROMPTS), (len(classes),)) for _ in range(2))
        pooled = encoder(torch.cat([ids[one, classes], ids[other, classes]])).pooler_output  # (2(K + 1), 32)
        a, b = F.normalize(pooled, dim=-1).chunk(2)
        return F.cross_entropy(a @ b.mT / 0.1, classes)

    fit("text", list(encoder.parameters()), loss, len(classes), steps, batch=1, peak_lr=peak_lr)
    return encoder.eval()


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Return padded token ids (B, 77), as StableDiffusionPipeline makes them."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def measure_prompt_cosine(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, names: list[str]) -> float:
    """Return the largest cosine between the pooled states of two prompts.

    The prompts are those of all classes and the empty one. The cosine is well below 1 if they are distinct.
    """
    pooled = encoder(tokenize(tokenizer, [PROMPTS[0].format(n) for n in names] + [""])).pooler_output
    unit = F.normalize(pooled, dim=-1)  # (K + 1, 32)
    return (unit @ unit.mT - 2 * torch.eye(len(unit))).max().item()
