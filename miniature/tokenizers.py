"""Small tokenizers of the families' own classes, made offline: they know letters, and what a pipeline's templates need."""

import inspect
import io
import json
import re
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHARACTERS = string.ascii_letters + string.digits + " .,:;!?'\"<>|_-()/"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "photo", "drawing"]


def clip_tokenizer(length: int = 77):
    """CLIP's, byte by byte but for a few words; it cuts prompts to `length` tokens."""
    from miniature.models import build_tokenizer

    tokenizer = build_tokenizer(WORDS)
    tokenizer.model_max_length = length
    return tokenizer


def t5_tokenizer(length: int = 512, words: Sequence[str] = ()):
    """T5's, a unigram model of letters, and of these words."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    letters = [(letter, -3.0) for letter in CHARACTERS if letter != " "]
    whole = [(f"\u2581{word}", -1.0) for word in words]
    return transformers.T5TokenizerFast(vocab=special + letters + whole, extra_ids=0, model_max_length=length)


def gemma_tokenizer():
    """Gemma's, of letters, with the beginning of text in front."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *(c for c in CHARACTERS if c != " ")]
    vocabulary = {name: i for i, name in enumerate(names)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)


def llama_tokenizer():
    """Llama's, of bytes."""
    names = [*byte_letters(), "<|begin_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(names)
    begin = ("<|begin_of_text|>", names.index("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        model_max_length=512,
    )


def mistral_processor():
    """Mistral's with its image processor, of bytes; its chat template is two lines of the real one's marks."""
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    names = ["<unk>", "<s>", "</s>", "<pad>", *marks, *byte_letters()]
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}"
        "[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(names), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=marks, model_max_length=4096, padding_side="left",
    )  # fmt: skip
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessorFast(), tokenizer=tokenizer, patch_size=14, spatial_merge_size=2,
        chat_template=template,
    )  # fmt: skip


def qwen_processor():
    """Qwen2.5-VL's with its image and video processors; it knows the words of the pipeline's template.

    The pipeline cuts off the first 128 tokens as the template's, so that must have as many as the real tokenizer makes of it.
    """
    import diffusers

    source = inspect.getsource(diffusers.Kandinsky5T2VPipeline.__init__)
    template = ["<|im_start|>system\nYou are a prompt engineer. Describe the video in detail."]
    template += re.findall(r'"([A-Z][^"]{20,})"', source)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, initial_alphabet=byte_letters(), show_progress=False
    )
    trained.train_from_iterator(["\n".join(template)] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    names = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", *marks]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=marks,
    )  # fmt: skip
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorFast(), tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )  # fmt: skip


def byte_letters() -> list[str]:
    """The letters by which byte-level tokenizers write the 256 bytes, in order."""
    alphabet = bytes_to_unicode()
    return [alphabet[byte] for byte in range(256)]


def byte_level(names: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer of bytes with this vocabulary."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def chatglm_tokenizer():
    """ChatGLM's, a SentencePiece model of letters."""
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CHARACTERS, " ".join(WORDS)] * 20),
        model_writer=model,
        vocab_size=len(CHARACTERS) + 8,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    tokenizer = ChatGLMTokenizer(str(path))
    tokenizer.folder = folder  # its save_pretrained copies the file, which goes when the tokenizer does
    return tokenizer
