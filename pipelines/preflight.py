"""Checks of a teacher and a student before the first gradient: what would silently spoil a distillation stops here.

These read files only; ``pipelines.probes`` goes on with what a hired teacher answers.

A check is a function of the pair with an entry in ``CHECKS``; it returns what it found, or raises UserError with the
cure. They run in order and the first failure stops, since later checks lean on earlier ones. Tokenizers are compared
by content and behaviour, never by file: one may be saved as tokenizer.json and the other as vocab.json and merges.txt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distill.chat import END_OF_TEXT, IM_END
from distill.checkpoint import Checkpoint, family_stop_ids, same_weights
from distill.errors import UserError
from distill.progress import say
from distill.types import MODES, Mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each text is there for a rule that tokenizers differ in: digits, spaces, line ends, case, contractions, scripts,
# composed against decomposed characters, joined emoji, bytes that start no token.
PROBES = (
    "The quick brown fox can't, won't and DIDN'T jump; they'll see.",
    "3+4*12-7= 1234567890 3.14159 1e-5 0x1F 12,345.67",
    "  two   spaces\tand\ttabs \n\n\n lines \r\n ends\r here   ",
    "def f(x):\n    return {'a': [x, -1], \"b\": x ** 2}  # $\\frac{1}{2}$ <p>&amp;</p>",
    "caf\u00e9 cafe\u0301 \ufb01ne \u212b \uac00 \u1100\u1161 na\u00efve Stra\u00dfe",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f3fd \u00a0\u2003\u200b \ue000 \x00\x7f",
    "user assistant system /think /no_think /nothink think _think",
)
CONVERSATION = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is 3+4?"},
    {"role": "assistant", "content": "<think>\n3+4=7\n</think>\n\n7"},
    {"role": "user", "content": "And 7*2?"},
)


@dataclass(frozen=True, slots=True)
class Pair:
    """What is checked: two models with their tokenizers, and the lengths that the run asks of them."""

    teacher: Checkpoint
    teacher_tokenizer: PreTrainedTokenizerBase
    student: Checkpoint
    student_tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_new_tokens: int
    template: PreTrainedTokenizerBase
    same_weights_allowed: bool = False
    one_more: Collection[str] = ()
    modes: Collection[Mode] = MODES

    @property
    def models(self) -> tuple[tuple[str, Checkpoint, PreTrainedTokenizerBase], ...]:
        return (
            ("teacher", self.teacher, self.teacher_tokenizer),
            ("student", self.student, self.student_tokenizer),
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A check of a teacher and what it found; ``skipped`` where it was not made, and the text says why."""

    check: str
    teacher: str
    text: str
    skipped: bool = False


Check = Callable[[Pair], str]


def check_pair(
    teacher: Checkpoint,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student: Checkpoint,
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    template: PreTrainedTokenizerBase | None = None,
    same_weights_allowed: bool = False,
    one_more: Collection[str] = (),
    modes: Collection[Mode] = MODES,
    skip: Collection[str] = (),
) -> Iterator[Finding]:
    """What every check of ``CHECKS`` found, in order. Raises UserError at the first that fails.

    ``template`` is the tokenizer that renders the run's prompts: the teacher's own, or for a specialist that of the
    teacher of all other prompts. ``one_more`` are those of "teacher" and "student" whose vLLM is asked for a token
    behind the longest response, ``modes`` those in which the run's stages ask.
    """
    pair = Pair(
        teacher,
        teacher_tokenizer,
        student,
        student_tokenizer,
        max_prompt_tokens,
        max_new_tokens,
        template or teacher_tokenizer,
        same_weights_allowed,
        one_more,
        modes,
    )
    for name, check in CHECKS.items():
        yield skipped(name, teacher.name) if name in skip else Finding(name, teacher.name, check(pair))


def skipped(check: str, teacher: str, why: str = "skipped on request") -> Finding:
    """The finding of a check that was not made."""
    return Finding(check, teacher, why, skipped=True)


def shown(findings: Iterable[Finding], student: str) -> Iterator[Finding]:
    """``findings`` as they come, each one a line to whoever watches."""
    for teacher, group in groupby(findings, key=lambda finding: finding.teacher):
        say(f"preflight, {teacher} teaches {student}:")
        for finding in group:
            say(f"  {'-' if finding.skipped else 'ok':2} {finding.check:<17} {finding.text}")
            yield finding


def check_vocabulary(pair: Pair) -> str:
    """Every id that is no added token stands for the same token."""
    added = {token for _, _, tokenizer in pair.models for token in _added(tokenizer)}
    teacher, student = (
        {index: token for token, index in tokenizer.get_vocab().items() if token not in added}
        for _, _, tokenizer in pair.models
    )
    if teacher != student:
        index = min(index for index in teacher.keys() | student.keys() if teacher.get(index) != student.get(index))
        raise UserError(
            f"teacher and student have different vocabularies ({len(teacher)} and {len(student)} tokens): token "
            f"{index} is {_shown(teacher.get(index))} for {pair.teacher.name} and {_shown(student.get(index))} for "
            f"{pair.student.name}; {_FAMILY}"
        )
    return f"{len(teacher)} tokens, the same in both"


def check_added_tokens(pair: Pair) -> str:
    """Both have the same added tokens, at the same ids, found in text by the same rules."""
    teacher, student = (_added(tokenizer) for _, _, tokenizer in pair.models)
    for token in [*teacher, *student]:
        if teacher.get(token) != student.get(token):
            raise UserError(
                f"the added token {token!r} differs: {pair.teacher.name} has {_described(teacher.get(token))}, "
                f"{pair.student.name} has {_described(student.get(token))}; copy the teacher's tokenizer files into "
                f"{pair.student.path} if the student's rows were trained with them, else {_FAMILY}"
            )
    return f"{len(teacher)} added tokens, the same in both"


def check_merges(pair: Pair) -> str:
    """Both join the same pairs of tokens, in the same order."""
    teacher, student = (_merges(tokenizer) for _, _, tokenizer in pair.models)
    for rank in range(max(len(teacher), len(student))):
        ours, theirs = (merges[rank] if rank < len(merges) else None for merges in (teacher, student))
        if ours != theirs:
            raise UserError(
                f"teacher and student tokenise differently: merge {rank} joins {_shown(ours)} for "
                f"{pair.teacher.name} and {_shown(theirs)} for {pair.student.name}; {_FAMILY}"
            )
    return f"{len(teacher)} merges, the same in both"


def check_encoding(pair: Pair) -> str:
    """Both turn the same texts into the same ids: normalisation, splitting rules and added tokens included."""
    around = [f"a {token} b{token}{token}\n{token}" for token in _added(pair.teacher_tokenizer)]
    texts = [*PROBES, *around]
    _same_ids(pair, texts, "the text")
    return f"{len(texts)} probe texts have the same ids"


def check_vocabulary_rows(pair: Pair) -> str:
    """Both models have as many rows in embedding and head, and enough for the tokenizer."""
    teacher, student = pair.teacher.shape.vocabulary, pair.student.shape.vocabulary
    if teacher != student:
        raise UserError(
            f"{pair.teacher.name} has {teacher} vocabulary rows and {pair.student.name} {student}: a divergence "
            f"between distributions over different sets is undefined; pad the smaller one with "
            f"model.resize_token_embeddings({max(teacher, student)}) and save it, or {_FAMILY}"
        )
    needed = max(pair.teacher_tokenizer.get_vocab().values()) + 1
    if teacher < needed:
        raise UserError(
            f"the models have {teacher} vocabulary rows and the tokenizer's ids go up to {needed - 1}; "
            f"the tokenizer belongs to another model: copy the one that was published with it"
        )
    return f"{teacher} rows in both, {teacher - needed} of them padding"


def check_stop_ids(pair: Pair) -> str:
    """Whatever ends a response of either model is one of the family's stop tokens, which count as one action."""
    family = family_stop_ids(pair.teacher_tokenizer)
    shown = f"{END_OF_TEXT} ({family[0]}) and {IM_END} ({family[1]})"
    for who, checkpoint, tokenizer in pair.models:
        for index in checkpoint.stop_ids:
            if index not in family:
                raise UserError(
                    f"the {who} {checkpoint.name} stops on token {index}, and this family's stop tokens are {shown}; "
                    f"set eos_token_id in {checkpoint.path / 'generation_config.json'} to one of these or both"
                )
        eos = tokenizer.eos_token_id
        if eos is not None and eos not in family:
            raise UserError(
                f"the tokenizer of the {who} {checkpoint.name} ends texts with {_shown(tokenizer.eos_token)} ({eos}), "
                f"and this family's stop tokens are {shown}; set eos_token in "
                f"{checkpoint.path / 'tokenizer_config.json'} to one of these"
            )
    return f"{shown}; together they are one action"


def check_context(pair: Pair) -> str:
    """Both models take the longest prompt and the longest response together."""
    needed = pair.max_prompt_tokens + pair.max_new_tokens
    for who, checkpoint, _ in pair.models:
        beyond = int(who in pair.one_more)
        if checkpoint.max_positions < needed + beyond:
            why = " (vLLM tells the log-probabilities of a sequence's last tokens with one after them alone)"
            raise UserError(
                f"the {who} {checkpoint.name} takes {checkpoint.max_positions} tokens (max_position_embeddings), and "
                f"max_prompt_tokens {pair.max_prompt_tokens} + max_new_tokens {pair.max_new_tokens}"
                f"{' + 1' * beyond} = {needed + beyond}{why * beyond}; lower max_prompt_tokens, or those of "
                f"stages.*.sampling.*.max_new_tokens and evaluation.sampling.*.max_new_tokens that are "
                f"{pair.max_new_tokens}"
            )
    least = min(pair.teacher.max_positions, pair.student.max_positions)
    return f"{needed} tokens at most, within {least}"


def check_template(pair: Pair) -> str:
    """Every teacher reads the conversation that the run's chat template renders as its own."""
    if pair.teacher_tokenizer.chat_template != pair.template.chat_template:
        raise UserError(
            f"the chat template of {pair.teacher.name} is not the one that this run's prompts are rendered with; put "
            f"the chat_template.jinja of the other teacher into {pair.teacher.path} if it was trained with that one, "
            f"else take a specialist of the same family and release"
        )
    return "the run's own"


def check_rendering(pair: Pair) -> str:
    """A conversation in the teacher's chat template has the same ids for both, in both modes."""
    template = pair.teacher_tokenizer
    if not template.chat_template:
        raise UserError(
            f"the tokenizer of the teacher {pair.teacher.name} has no chat template; take the post-trained model, "
            f"not its base, or put its chat_template.jinja into {pair.teacher.path}"
        )
    _same_ids(pair, _rendered(template), "the rendered conversation")
    return "a conversation has the same ids for both, in both modes"


def check_modes(pair: Pair) -> str:
    """Where the run asks in both modes, the teacher's chat template tells them apart."""
    if len(pair.modes) < len(MODES):
        return f"the run's stages ask in one mode ({', '.join(pair.modes)})"
    if len(set(_rendered(pair.template))) < len(MODES):
        raise UserError(
            f"the chat template of {pair.teacher.name} renders a prompt alike in thinking and in non-thinking mode, so "
            f"this model knows one of them, and this run's stages ask in both; set their mixture.think_share to 1 "
            f"where it thinks and to 0 where it does not (and evaluation.modes to that one), or take a teacher that "
            f"has both modes"
        )
    return "a prompt is rendered in two ways, thinking and not"


def check_different_weights(pair: Pair) -> str:
    """The teacher is not the student."""
    if not same_weights(pair.teacher, pair.student):
        return "teacher and student hold different weights"
    if pair.same_weights_allowed:
        return "teacher and student are the same model, which this run allows"
    raise UserError(
        f"the teacher {pair.teacher.name} and the student {pair.student.name} hold the same weights, so there is "
        f"nothing to learn; name another --student (a base model, or a smaller one), or say "
        f"--set preflight.same_weights=true to distil a model into itself"
    )


CHECKS: dict[str, Check] = {
    "vocabulary": check_vocabulary,
    "added_tokens": check_added_tokens,
    "merges": check_merges,
    "encoding": check_encoding,
    "vocabulary_rows": check_vocabulary_rows,
    "stop_ids": check_stop_ids,
    "context": check_context,
    "template": check_template,
    "rendering": check_rendering,
    "modes": check_modes,
    "different_weights": check_different_weights,
}
"""The catalogue, in the order in which they run."""

_FAMILY = "take both models from one family, for example --teacher 4B --student 0.6B"


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Id and matching rules of the added tokens.

    Left out: ``special``, which matters to decoding only, and ``normalized``, which transformers sets by the token's
    role; where either changes ids, the probe texts around each added token show it.
    """
    found = {}
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        rules = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
        found[token.content] = (index, tuple(rule for rule, is_on in rules.items() if is_on))
    return found


def _rendered(template: PreTrainedTokenizerBase) -> list[str]:
    """A conversation in each mode, by the hard switch."""
    messages: Any = [dict(message) for message in CONVERSATION]
    return [
        str(
            template.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=mode == "think"
            )
        )
        for mode in MODES
    ]


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, ...]]:
    """The merges in order; files write a pair as a list or as one string with a space."""
    described = json.loads(_backend(tokenizer).to_str())["model"]
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in described.get("merges", [])]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    assert tokenizer.is_fast, "load_tokenizer gives fast tokenizers only"
    return tokenizer.backend_tokenizer


def _same_ids(pair: Pair, texts: Sequence[str], what: str) -> None:
    for text in texts:
        teacher, student = (list(tokenizer.encode(text, add_special_tokens=False)) for _, _, tokenizer in pair.models)
        if teacher != student:
            place = next((at for at, ids in enumerate(zip(teacher, student, strict=False)) if len(set(ids)) > 1), None)
            at = min(len(teacher), len(student)) if place is None else place
            raise UserError(
                f"teacher and student tokenise differently: {what} {text!r} is {teacher[at : at + 4]} from token {at} "
                f"on for {pair.teacher.name} and {student[at : at + 4]} for {pair.student.name}; {_FAMILY}"
            )


def _shown(token: object) -> str:
    return "absent" if token is None else repr(token)


def _described(added: tuple[int, tuple[str, ...]] | None) -> str:
    if added is None:
        return "none"
    return f"id {added[0]}" + (f" ({', '.join(added[1])})" if added[1] else "")
