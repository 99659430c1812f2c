"""Small tokenizers of the families' own classes, made offline: they know letters, and what a pipeline's templates need."""

import io
import string
import tempfile
from pathlib import Path

CHARACTERS = string.ascii_letters + string.digits + " .,:;!?'\"<>|_-()/"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "photo", "drawing"]


def clip_tokenizer(length: int = 77):
    """CLIP's, byte by byte but for a few words; it cuts prompts to `length` tokens."""
    from miniature.models import build_tokenizer

    tokenizer = build_tokenizer(WORDS)
    tokenizer.model_max_length = length
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
