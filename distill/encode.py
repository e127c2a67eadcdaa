"""Prompts to token ids and back: the one place where text becomes ids.

Both models of a pair are rendered with the teacher's chat template and see the same ids; a KL divergence between two
renderings would measure the rendering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.chat import EARLY_STOP, END_OF_TEXT, IM_END, THINK_CLOSE, THINK_OPEN, switch_in, with_switch
from distill.errors import UserError
from distill.types import Message, Mode, Prompt, Request, Rollout, Sampling, Switch, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer with a chat template and the ids that Qwen3's conventions give a meaning.

    Raises UserError where the tokenizer lacks one of the family's tokens or has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError("the teacher's tokenizer has no chat template; take the post-trained model, not its base")
        self.tokenizer = tokenizer
        self.stop_ids = (self._id_of(IM_END), self._id_of(END_OF_TEXT))
        """The family's stop tokens; together they are one action."""
        self.think_open_id = self._id_of(THINK_OPEN)
        self.think_close_id = self._id_of(THINK_CLOSE)
        self.early_stop_ids = tuple(tokenizer.encode(EARLY_STOP, add_special_tokens=False))
        self.template_hash = content_hash(tokenizer.chat_template)
        self.vocabulary_hash = content_hash(tokenizer.get_vocab())

    def _id_of(self, token: str) -> int:
        ids: list[int] = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"the tokenizer has no single token {token} (it splits into {len(ids)}); models of the Qwen3 family do"
            )
        return ids[0]

    def encode(self, prompt: Prompt, *, mode: Mode, switch: Switch) -> tuple[int, ...]:
        """The ids of the prompt up to where the response begins.

        Non-thinking by the hard switch puts an empty thinking block at the prompt's end; by the soft switch the model
        writes that block itself, so it is response. A prompt that holds a flag already is left as it is.
        """
        if switch == "soft":
            messages = prompt.messages if switch_in(prompt.messages) == mode else with_switch(prompt.messages, mode)
            text = self._render(messages)
        else:
            text = self._render(prompt.messages, enable_thinking=mode == "think")
        # How long a prompt may be is max_prompt_tokens' affair; the tokenizer would warn of a limit of its own.
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation that waits for an answer, in the mode whose prompt is the longer one."""
        return len(self.encode(Prompt(tuple(messages)), mode="no_think", switch="hard"))

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
        )
        assert isinstance(text, str)
        return text

    def request(self, prompt: Prompt, *, mode: Mode, sampling: Sampling, seed: int, switch: Switch = "hard") -> Request:
        """The prompt, rendered for a mode and ready for a sampler."""
        return Request(prompt, mode, switch, self.encode(prompt, mode=mode, switch=switch), sampling, seed)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens kept."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def closed_thinking(self, rollout: Rollout) -> bool:
        """Whether the response's thinking ended (closed by the model or by the early stop) and was not opened again.

        A response that has no mark of thinking never ended it, unless the prompt has done so.
        """
        closing = {self.think_close_id}
        if self.think_close_id not in self.early_stop_ids:  # one token stands for the whole string
            closing.add(self.early_stop_ids[-1])
        marks = [token for token in rollout.response_ids if token == self.think_open_id or token in closing]
        if not marks:
            return rollout.mode == "no_think" and rollout.switch == "hard"
        return marks[-1] != self.think_open_id
