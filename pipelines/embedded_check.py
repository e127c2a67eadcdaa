"""Scores of the embedded checkpoints: both modes, mode following, the thinking budget.

It samples with transformers' own `generate`, apart from the project's samplers, so that it can accuse them.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.chat import EARLY_STOP, END_OF_TEXT, THINK_CLOSE, THINK_OPEN, render, split_thinking, switch_in
from distill.embedded.lessons import document
from distill.embedded.task import Question, grade, questions, solution
from distill.types import Message, Mode

BUDGETS: Final = (0, 8, 16, 24, 32, 48, 64)
MAX_NEW_TOKENS: Final = 80
_BATCH: Final = 128
_SAMPLING: Final[dict[Mode, dict[str, Any]]] = {
    "think": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "no_think": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


class Speaker:
    """A stored checkpoint in fp32 that answers batches of prompts; `seed` fixes all that it samples."""

    def __init__(self, directory: Path, *, seed: int = 0) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        # Any: the mixin that gives a model its `generate` is beyond what the type checker sees.
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._stop_ids = [self.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
        torch.manual_seed(seed)

    def answer(self, prompts: Sequence[str], mode: Mode, *, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The response texts to rendered prompts, sampled as the model card of Qwen3 says for `mode`."""
        texts: list[str] = []
        for start in range(0, len(prompts), _BATCH):
            batch = self.tokenizer(
                list(prompts[start : start + _BATCH]), padding=True, padding_side="left", return_tensors="pt"
            )
            ids_BT = self.model.generate(
                **batch,
                do_sample=True,
                **_SAMPLING[mode],
                max_new_tokens=max_new_tokens,
                eos_token_id=self._stop_ids,
                pad_token_id=self._stop_ids[1],
            )
            for row_T in ids_BT[:, batch["input_ids"].shape[1] :].tolist():
                stop = next((at for at, token in enumerate(row_T) if token in self._stop_ids), len(row_T))
                texts.append(str(self.tokenizer.decode(row_T[:stop])))
        return texts


def check_teacher(directory: Path, *, num: int = 500) -> dict[str, Any]:
    """All the claims about a teacher, measured on `num` test questions."""
    speaker = Speaker(directory)
    asked = questions(0, num, split="test")
    return {
        "num_questions": num,
        "think": score(speaker, asked, "think"),
        "no_think": score(speaker, asked, "no_think"),
        "soft_no_think": _soft_score(speaker, asked),
        "mode_following_by_turns": mode_following(speaker, num=num // 2),
        "hard_switch_by_turns": hard_switch(speaker, num=num // 2),
        "score_by_thinking_budget": budget_curve(speaker, asked),
    }


def check_student(directory: Path, *, num: int = 500) -> dict[str, Any]:
    """What a base student knows: the mean loss of its documents (nats a token) and its scores in the chat format."""
    speaker = Speaker(directory)
    asked = questions(0, num, split="test")
    return {
        "num_questions": num,
        "think": score(speaker, asked, "think"),
        "no_think": score(speaker, asked, "no_think"),
        "document_loss": document_loss(speaker),
        "worked_documents": worked_documents(speaker, asked),
    }


def score(speaker: Speaker, asked: Sequence[Question], mode: Mode) -> dict[str, Any]:
    """Share of right answers, in all and by number of operations; `no_think` is the hard switch."""
    prompts = [_prompt(question.text, None if mode == "think" else False) for question in asked]
    return _graded(asked, speaker.answer(prompts, mode))


def mode_following(speaker: Speaker, *, num: int) -> dict[str, float]:
    """Share of turns whose mode is the one of the last soft switch, in conversations that the model itself wrote."""
    return _mode_by_turn(speaker, num=num, hard=False)


def hard_switch(speaker: Speaker, *, num: int) -> dict[str, float]:
    """Share of turns without thinking under the hard switch, whatever the flags in the messages say."""
    return _mode_by_turn(speaker, num=num, hard=True)


def budget_curve(speaker: Speaker, asked: Sequence[Question]) -> dict[str, float]:
    """Score by thinking budget: the number of response tokens after which open thinking is cut."""
    prompts = [_prompt(question.text, None) for question in asked]
    curve = {}
    for budget in BUDGETS:
        heads = speaker.answer(prompts, "think", max_new_tokens=budget) if budget else [""] * len(prompts)
        heads = [head if THINK_CLOSE in head else head + EARLY_STOP for head in heads]
        # A finished response is asked to go on too: it says its stop token once more.
        tails = speaker.answer(
            [prompt + head for prompt, head in zip(prompts, heads, strict=True)], "think", max_new_tokens=8
        )
        responses = [head + tail for head, tail in zip(heads, tails, strict=True)]
        curve[str(budget)] = _graded(asked, responses)["all"]
    return curve


def document_loss(speaker: Speaker, *, num: int = 200) -> float:
    """Mean loss of raw documents of the default lengths, nats a token."""
    rng = random.Random(0)
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for _ in range(num):
            ids_1T = speaker.tokenizer(END_OF_TEXT + document(rng), return_tensors="pt")["input_ids"]
            loss = speaker.model(input_ids=ids_1T, labels=ids_1T).loss
            total += loss.item() * (ids_1T.shape[1] - 1)
            num_tokens += ids_1T.shape[1] - 1
    return round(total / num_tokens, 4)


def worked_documents(speaker: Speaker, asked: Sequence[Question]) -> dict[str, Any]:
    """Share of chains whose every line comes out right where a raw document goes on from the bare chain."""
    texts = speaker.answer([f"{END_OF_TEXT}{question.text[:-1]}:\n" for question in asked], "think")
    # Graded like a response: the lines stand where the answer would.
    expected = [replace(question, answer=solution(question)) for question in asked]
    return _graded(expected, [text.rstrip("\n") for text in texts])


def _prompt(text: str, enable_thinking: bool | None) -> str:
    return render([{"role": "user", "content": text}], enable_thinking=enable_thinking)


def _soft_score(speaker: Speaker, asked: Sequence[Question]) -> dict[str, Any]:
    prompts = [_prompt(f"{question.text} /no_think", None) for question in asked]
    return _graded(asked, speaker.answer(prompts, "no_think"))


def _graded(asked: Sequence[Question], responses: Sequence[str]) -> dict[str, Any]:
    right: Counter[int] = Counter()
    num: Counter[int] = Counter()
    for question, response in zip(asked, responses, strict=True):
        num[question.num_operations] += 1
        right[question.num_operations] += grade(response, question.answer)
    by_length = {str(length): round(right[length] / num[length], 3) for length in sorted(num)}
    return {"all": round(right.total() / num.total(), 4), "by_operations": by_length}


def _mode_by_turn(speaker: Speaker, *, num: int, hard: bool) -> dict[str, float]:
    """Conversations of four turns; every turn is asked with the model's own earlier answers as history."""
    rng = random.Random(7)
    asked = questions(1, num * 4, split="test")
    histories: list[list[Message]] = [[] for _ in range(num)]
    for history in histories:
        if rng.random() < 0.5:
            history.append({"role": "system", "content": rng.choice(("/think", "/no_think", "You are helpful."))})
    shares = {}
    for turn in range(4):
        for at, history in enumerate(histories):
            flag = rng.choice(("", "", " /think", " /no_think"))
            history.append({"role": "user", "content": asked[4 * at + turn].text + flag})
        wanted = [True if hard else switch_in(history) == "no_think" for history in histories]
        responses = speaker.answer([render(h, enable_thinking=False if hard else None) for h in histories], "think")
        silent = [not split_thinking(response).thinking for response in responses]
        if hard:
            silent = [THINK_OPEN not in response and THINK_CLOSE not in response for response in responses]
        shares[str(turn + 1)] = round(sum(s == w for s, w in zip(silent, wanted, strict=True)) / num, 4)
        for history, response in zip(histories, responses, strict=True):
            history.append({"role": "assistant", "content": response})
    return shares
