"""The embedded models' tokenizer: byte-level BPE by Qwen3's conventions, with 25 merges instead of 151,387.

As in Qwen3: every digit is a token; `user`, `assistant`, `system` and a blank line are one token each; `/think` is
`/`+`think` and `/no_think` is `/no`+`_think`; text is normalised to NFC and otherwise survives byte for byte; the
model has more rows than the tokenizer has tokens. Unlike Qwen3, the early-stop sentence is one token.
"""

from typing import Any, Final

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.chat import EARLY_STOP, END_OF_TEXT, IM_END, IM_START, TEMPLATE_PATH, THINK_CLOSE, THINK_OPEN

VOCAB_ROWS: Final = 320
"""Rows of the models' embeddings; those from `len(tokenizer)` on are padding that no text reaches."""

_WORDS: Final = ("user", "assistant", "system", "no", "think", "_think", "/no", " /", "\n\n")


def build_tokenizer() -> Qwen2Tokenizer:
    """A fresh tokenizer. Saving it writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    merges = _merges()
    symbols = [*bytes_to_unicode().values(), *(left + right for left, right in merges)]
    vocab_and_merges: dict[str, Any] = {
        "vocab": {symbol: index for index, symbol in enumerate(symbols)},
        "merges": merges,
    }
    tokenizer = Qwen2Tokenizer(
        **vocab_and_merges,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
    )
    tokenizer.add_tokens([END_OF_TEXT, IM_START, IM_END], special_tokens=True)
    # Ordinary added tokens: `skip_special_tokens` must not drop the thinking's ends from a decoded response.
    tokenizer.add_tokens([THINK_OPEN, THINK_CLOSE, EARLY_STOP])
    tokenizer.chat_template = TEMPLATE_PATH.read_text(encoding="utf-8")
    return tokenizer


def _merges() -> list[tuple[str, str]]:
    """Every word grown letter by letter, or from `no` and `think` where it holds one."""
    letter = bytes_to_unicode()
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        symbols = [letter[byte] for byte in word.encode()]
        for left, right in list(merges):
            symbols = _merged(symbols, left, right)
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = None
            symbols = _merged(symbols, symbols[0], symbols[1])
    return list(merges)


def _merged(symbols: list[str], left: str, right: str) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if symbol == right and out and out[-1] == left:
            out[-1] = left + right
        else:
            out.append(symbol)
    return out
