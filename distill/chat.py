"""Qwen3's chat format: how a conversation becomes a prompt and how a response splits into thinking and answer.

The format is one file, `chat_template.jinja` beside this module. The embedded tokenizers carry the same file, so
`tokenizer.apply_chat_template` and `render` give the same bytes. Left out on purpose: schemas of tools (a system
message can hold them) and contents that are not text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distill.errors import UserError
from distill.types import Message, Mode

TEMPLATE_PATH: Final = Path(__file__).with_name("chat_template.jinja")

IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
END_OF_TEXT: Final = "<|endoftext|>"
THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"

EMPTY_THINK: Final = "<think>\n\n</think>\n\n"
"""The hard switch writes it into the prompt; after a soft switch the model writes it itself."""

EARLY_STOP: Final = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)
"""What ends the thinking of a response whose thinking budget is spent (Qwen3 Technical Report, section 4.3)."""

# A flag is a word of its own: `/thinking`, `a/think/b`, `./think` and `/think.py` are paths or longer words.
_SWITCH = re.compile(r"(?<![\w/.~-])/(no_think|think)(?![\w/-]|\.\w)")


@dataclass(frozen=True, slots=True)
class Parts:
    """A response, split at its thinking block.

    `closed` is False for a response that ended while it was still thinking; it has no answer then.

    >>> split_thinking("<think>\\n3+4=7\\n</think>\\n\\n7<|im_end|>")
    Parts(thinking='3+4=7', answer='7', closed=True)
    """

    thinking: str
    answer: str
    closed: bool


def render(
    messages: Sequence[Message], *, enable_thinking: bool | None = None, add_generation_prompt: bool = True
) -> str:
    """The text of a conversation, as Qwen3's models read it.

    `enable_thinking=False` is the hard switch: the empty thinking block becomes part of the prompt. `None` and `True`
    leave the choice to the model and to the soft switches in the messages. Raises `UserError` for an unknown role or a
    content that is not text.
    """
    variables: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    return _template().render(variables)


def switch_in(messages: Sequence[Message]) -> Mode | None:
    """The mode that the last soft switch of the user and system messages asks for, None without one."""
    found: Mode | None = None
    for message in messages:
        if message["role"] in ("user", "system"):
            for flag in _SWITCH.findall(message["content"]):
                found = "think" if flag == "think" else "no_think"
    return found


def with_switch(messages: Sequence[Message], mode: Mode) -> tuple[Message, ...]:
    """The conversation with the soft switch for `mode` at the end of its last user message."""
    last_user = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last_user is None:
        raise UserError("a soft switch needs a user message to stand in, and the conversation has none: add one")
    return tuple(
        {**message, "content": f"{message['content']} /{mode}"} if at == last_user else message
        for at, message in enumerate(messages)
    )


def split_thinking(text: str) -> Parts:
    """Thinking and answer of a response, both without the blank lines around them.

    Three forms occur: the response writes the block itself; the block stood in the prompt (no tag at all, or only a
    closing one); the block was never closed. As in the chat template, what follows the last `</think>` is the answer.
    """
    text = text.removesuffix(END_OF_TEXT).removesuffix(IM_END)
    before, close, after = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in after:
        return Parts(thinking=after.partition(THINK_OPEN)[2].strip("\n"), answer="", closed=False)
    if not close:
        return Parts(thinking="", answer=text, closed=True)
    thinking = before.partition(THINK_CLOSE)[0].rpartition(THINK_OPEN)[2]
    return Parts(thinking=thinking.strip("\n"), answer=after.lstrip("\n"), closed=True)


@cache
def _template() -> jinja2.Template:
    # Trimmed blocks, unescaped JSON and a sandbox: the environment that transformers gives a chat template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raise(sentence: str) -> NoReturn:
    raise UserError(sentence)
