"""A tokenizer that needs no files, and the check that a tokenizer fits a model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from torchtitan.components.tokenizer import BaseTokenizer

logger = logging.getLogger(__name__)


class ByteTokenizer(BaseTokenizer):
    """UTF-8 bytes as ids 0..255, then bos, eos, pad: 259 ids. `decode(encode(text)) == text` for every str.

    Text never turns into a special id, whatever it says.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def __init__(self, config: Config | None = None, *, tokenizer_path: str | None = None) -> None:
        # The trainer passes its hf_assets_path to every tokenizer; this one reads nothing.
        super().__init__()
        self.eos_id = 257

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        # surrogatepass: a lone surrogate is a legal str, and round trips too.
        ids = list(text.encode("utf-8", "surrogatepass"))
        return [self.bos_id] * add_bos + ids + [self.eos_id] * add_eos

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special ids are left out; bytes that are no UTF-8 (a sample cut inside a character) become U+FFFD."""
        data = bytes(i for i in token_ids if i < 256)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def get_vocab_size(self) -> int:
        return self.vocab_size


def largest_token_id(tokenizer: BaseTokenizer) -> int:
    """Ids of a tokenizer.json may have gaps, so the count of its tokens is not enough."""
    get_vocab = getattr(tokenizer, "get_vocab", None)
    return max(get_vocab().values()) if get_vocab is not None else tokenizer.get_vocab_size() - 1


def check_vocabulary(tokenizer: BaseTokenizer, model_vocab_size: int) -> None:
    """ValueError when the tokenizer can produce an id outside the model's embedding. A smaller one is fine."""
    largest = largest_token_id(tokenizer)
    if largest >= model_vocab_size:
        raise ValueError(
            f"the tokenizer produces ids up to {largest}, the model's vocabulary has {model_vocab_size}: "
            f"give the model a vocab_size of at least {largest + 1}, or use a smaller tokenizer"
        )
    if largest + 1 < model_vocab_size:
        _log_unused(largest + 1, model_vocab_size)


@cache
def _log_unused(used: int, model_vocab_size: int) -> None:
    logger.info("the tokenizer uses %d of the model's %d vocabulary entries", used, model_vocab_size)


_PROBE = "def f(x, *, y=0.25):\n\treturn {'naïve': x[1:] != y}  # 12345 → 数学\r\n"


def tokenizer_fingerprint(tokenizer: BaseTokenizer) -> str:
    """Equal for tokenizers that make the same ids of a probe and have as many of them."""
    ids = tokenizer.encode(_PROBE, add_bos=True, add_eos=True)
    return blake2b(repr((tokenizer.get_vocab_size(), ids)).encode(), digest_size=8).hexdigest()
