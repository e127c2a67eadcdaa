"""Does the mode follow the flags? Conversations of several turns with `/think` and `/no_think` here and there.

After the ThinkFollow benchmark of the report (section 4.7), whose data was never published. A turn is in thinking
mode if something stands in its thinking block; which mode it should be in is `eval.dialogues`' rule. Every turn is
asked with the model's own earlier answers as history. Whether a quoted flag is taken for a flag is shown apart.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.chat import split_thinking
from distill.costs import sequence_flops
from distill.errors import DistillError
from distill.family import Shape
from distill.journal import write_json
from distill.progress import track
from distill.response import opening
from distill.seeding import derive
from distill.types import MODES, Message, Mode, Prompt, Request, Rollout, Sampling, content_hash
from eval.dialogues import KINDS, Turn, dialogues
from eval.evaluation import Leakage, leakage
from eval.runner import file_name, read_back, speak
from eval.samples import Row, decoded, fitted, read_rows, thinking_length, write_rows
from eval.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pyarrow

    from distill.encode import Encoder
    from distill.sampler import Sampler

TASK = "mode_switching"
NUM_DIALOGUES = 128
NUM_TURNS = 4


@dataclass(frozen=True, slots=True)
class ModeSwitching:
    """What the test found, by metric: shares of turns in the right mode, clustered by conversation.

    ``right_mode`` is over all turns but those with a quoted flag, ``right_mode@N`` over the N-th turns of these,
    ``right_mode/plain``, ``/both`` and ``/system`` over those that such a flag decides, ``right_mode/think`` and
    ``/no_think`` over those that should be in that mode. ``quoted`` is the share of quoted flags that were followed.
    ``leakage`` is over the turns that should not think (None without such turns).
    """

    checkpoint: str
    settings_hash: str
    num_dialogues: int
    num_turns: int
    metrics: Mapping[str, Estimate]
    leakage: Leakage | None
    num_broken: int
    num_tokens: int
    num_prompt_tokens: int
    flops: float | None
    seconds: float

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One object a metric, in the form of ``summary.json``'s scores; a question is a conversation."""
        metrics = dict(self.metrics) | ({"leakage": self.leakage.share} if self.leakage else {})
        return [
            {"checkpoint": self.checkpoint, "task": TASK, "mode": "both", "metric": metric, **result.entry}
            for metric, result in metrics.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; ``kind`` tells it from an evaluation's document."""
        return {
            "kind": TASK,
            **asdict(self),
            "metrics": [{"metric": metric, **result.to_json()} for metric, result in self.metrics.items()],
            "leakage": None if self.leakage is None else self.leakage.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModeSwitching:
        found = {key: value for key, value in document.items() if key != "kind"}
        leakage = document["leakage"]
        return cls(
            **found
            | {
                "metrics": {entry["metric"]: Estimate.from_json(entry) for entry in document["metrics"]},
                "leakage": None if leakage is None else Leakage.from_json(leakage),
            }
        )


def examine_switching(
    questions: Sequence[str],
    *,
    sampler: Sampler,
    encoder: Encoder,
    sampling: Mapping[Mode, Sampling],
    seed: int,
    checkpoint: str,
    num: int = NUM_DIALOGUES,
    num_turns: int = NUM_TURNS,
    out: Path | None = None,
    weights: str = "",
    shape: Shape | None = None,
    context: int | None = None,
) -> ModeSwitching:
    """Hold ``num`` conversations of ``num_turns`` turns with whoever ``sampler`` speaks for.

    With ``out``, writes ``<out>/<checkpoint>-mode_switching.json`` and the same name ``.parquet`` with every turn; goes
    on after the last finished turn, and reads back a test that is there with the same settings. ``weights``, ``shape``
    and ``context`` are as in ``eval.runner.evaluate``. Raises what the sampler raises, and DistillError where no
    conversation's turn can be had.
    """
    conversations = dialogues(questions, num=num, num_turns=num_turns, seed=seed)
    settings = content_hash(
        {
            "checkpoint": checkpoint,
            "weights": weights,
            "dialogues": [[asdict(turn) for turn in dialogue] for dialogue in conversations],
            "sampling": {mode: asdict(one) for mode, one in sampling.items()},
            "seed": seed,
            "context": context,
        }
    )
    name = file_name(f"{checkpoint}-{TASK}")
    if out is not None and (done := read_back(out / f"{name}.json", settings, ModeSwitching.from_json)) is not None:
        return done
    parts = None if out is None else out / f".{name}-{settings[:12]}"
    rows = _spoken(
        conversations,
        sampler=sampler,
        encoder=encoder,
        sampling=sampling,
        seed=seed,
        context=context,
        parts=parts,
        who=f"{checkpoint}, {TASK}",
    )
    found = _summarise(rows, checkpoint=checkpoint, settings_hash=settings, num=num, num_turns=num_turns, shape=shape)
    if out is not None and parts is not None:
        write_rows(out / f"{name}.parquet", rows, _schema())
        write_json(out / f"{name}.json", found.to_json())
        shutil.rmtree(parts, ignore_errors=True)
    return found


def _spoken(
    conversations: Sequence[tuple[Turn, ...]],
    *,
    sampler: Sampler,
    encoder: Encoder,
    sampling: Mapping[Mode, Sampling],
    seed: int,
    context: int | None,
    parts: Path | None,
    who: str,
) -> list[Row]:
    """The turns of all conversations, first turns first."""
    histories: list[list[Message]] = [[] for _ in conversations]
    rows: list[Row] = []
    with track(who, sum(map(len, conversations)), "responses") as bar:
        for number in range(len(conversations[0])):
            turns = [dialogue[number] for dialogue in conversations]
            for history, turn in zip(histories, turns, strict=True):
                history += turn.messages
            part = None if parts is None else parts / f"{number}.parquet"
            if part is not None and part.exists():
                fresh = read_rows(part)
                bar.advance(len(fresh))
            else:
                requests = [
                    _request(history, turn, encoder, sampling[turn.wanted], derive(seed, TASK, place, number))
                    for place, (history, turn) in enumerate(zip(histories, turns, strict=True))
                ]
                begun, before = time.perf_counter(), bar.done
                said = speak(sampler, [fitted(one, context) for one in requests], lambda rollout: bar.advance())
                bar.advance(before + len(requests) - bar.done)
                seconds = (time.perf_counter() - begun) / len(requests)
                fresh = [
                    {"prompt_id": f"dialogue_{place}", "turn": number + 1, "seconds": seconds}
                    | _row(turn, request, one, encoder)
                    for place, (turn, request, one) in enumerate(zip(turns, requests, said, strict=True))
                ]
                if all(row["broken"] for row in fresh):
                    raise DistillError(f"{who}: no response can be had: {fresh[0]['response']}")
                if part is not None:
                    write_rows(part, fresh, _schema())
            for history, row in zip(histories, fresh, strict=True):
                history.append({"role": "assistant", "content": row["answer"]})
            rows += fresh
    return rows


def _request(history: Sequence[Message], turn: Turn, encoder: Encoder, sampling: Sampling, seed: int) -> Request:
    """The conversation so far, with no other flag than those it holds: the model has the choice."""
    prompt = Prompt(tuple(history))
    return Request(prompt, turn.wanted, "soft", encoder.encode(prompt, mode="think", switch="hard"), sampling, seed)


def _row(turn: Turn, request: Request, said: Rollout | str, encoder: Encoder) -> Row:
    facts = {
        "asked": turn.messages[-1]["content"],
        "wanted": turn.wanted,
        "kind": turn.kind,
        "broken": isinstance(said, str),
        "num_prompt_tokens": len(request.prompt_ids),
    }
    if isinstance(said, str):
        nothing = {"thinking": "", "answer": "", "right": False, "num_tokens": 0, "num_thinking_tokens": 0}
        return facts | nothing | {"response": f"[{said}]"}
    text = decoded(said, encoder)
    parts = split_thinking(opening(said, encoder) + text)
    return facts | {
        "response": text,
        "thinking": parts.thinking,
        "answer": parts.answer,
        "right": bool(parts.thinking.strip()) == (turn.wanted == "think"),
        "num_tokens": len(said.response_ids),
        "num_thinking_tokens": thinking_length(said, encoder),
    }


def _summarise(
    rows: Sequence[Row], *, checkpoint: str, settings_hash: str, num: int, num_turns: int, shape: Shape | None
) -> ModeSwitching:
    ruled = [row for row in rows if row["kind"] != "quoted"]
    silent = [row for row in ruled if row["wanted"] == "no_think"]
    parts = {
        "right_mode": ruled,
        **{f"right_mode@{turn}": [row for row in ruled if row["turn"] == turn] for turn in range(1, num_turns + 1)},
        **{f"right_mode/{kind}": [row for row in ruled if row["kind"] == kind] for kind in KINDS},
        **{f"right_mode/{mode}": [row for row in ruled if row["wanted"] == mode] for mode in MODES},
        "quoted": [row for row in rows if row["kind"] == "quoted"],
    }
    return ModeSwitching(
        checkpoint=checkpoint,
        settings_hash=settings_hash,
        num_dialogues=num,
        num_turns=num_turns,
        metrics={metric: estimate(_shares(part)) for metric, part in parts.items() if part},
        leakage=leakage(silent) if silent else None,
        num_broken=sum(row["broken"] for row in rows),
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_prompt_tokens=sum(row["num_prompt_tokens"] for row in rows),
        flops=None
        if shape is None
        else sum(sequence_flops(shape, row["num_prompt_tokens"], row["num_tokens"]) for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )


def _shares(rows: Sequence[Row]) -> dict[str, list[float]]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["prompt_id"], []).append(float(row["right"]))
    return shares


def _schema() -> pyarrow.Schema:
    import pyarrow

    text, count, flag = pyarrow.string(), pyarrow.int64(), pyarrow.bool_()
    names = {
        **dict.fromkeys(("prompt_id", "asked", "wanted", "kind", "response", "thinking", "answer"), text),
        **dict.fromkeys(("turn", "num_prompt_tokens", "num_tokens", "num_thinking_tokens"), count),
        **dict.fromkeys(("broken", "right"), flag),
        "seconds": pyarrow.float64(),
    }
    return pyarrow.schema(list(names.items()))
