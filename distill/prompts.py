"""Where prompts come from: the embedded task, one's own files, or sets on the hub.

A row is a JSON object or a parquet row: ``prompt`` as text or as a list of messages, and optionally ``answer`` (the
reference for grading), ``mode``, ``language``, ``domain``. Everything is read and checked before a run starts, so that
what is wrong with line 70,000 is known at once; afterwards prompts are drawn by position.

Held out: of the distinct prompts that have an answer, 5 % (at least one, at most 500) are for evaluation and are never
trained on. They are those with the smallest content hashes, whatever the seed and the order of the file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from distill.errors import DistillError, UserError
from distill.progress import say
from distill.prompt_config import EmbeddedPrompts, FilePrompts, HubPrompts, HubSet, PromptSettings
from distill.prompt_files import file_prompts
from distill.prompt_rows import FIELDS, prompt_of, reason_of
from distill.seeding import derive
from distill.types import Message, Prompt, content_hash

HELD_OUT_SHARE = 0.05
HELD_OUT_MOST = 500

CountTokens = Callable[[Sequence[Message]], int]
"""How many tokens a conversation is, rendered and ready to be answered."""

_CHUNK_ROWS = 4096
_TEMPLATE_TOKENS = 128  # tokens that a chat template puts around one message, generously


class PromptSource(Protocol):
    """Prompts by position. What stands at a position depends on the source's data and its seed alone."""

    @property
    def content_hash(self) -> str:
        """What the data is, for the manifest."""

    @property
    def num_train(self) -> int | None:
        """Different prompts to train on; None where they never run out."""

    @property
    def domains(self) -> Mapping[str, int]:
        """The domains that prompts name, with how many do."""

    @property
    def grader(self) -> str | None:
        """The grader that the answers are made for; None where the answers themselves have to decide."""

    def at(self, position: int) -> Prompt:
        """The training prompt at a position, counted from the start of training and past the end of the data."""

    def batch(self, start: int, num: int) -> list[Prompt]:
        """The training prompts at ``start`` .. ``start + num - 1``."""

    def held_out(self) -> list[Prompt]:
        """Prompts with an answer that are never trained on."""

    def num_trained(self, prompts: Sequence[Prompt]) -> int:
        """How many of ``prompts``, which somebody is examined on, are trained on."""


class EmbeddedSource:
    """Fresh train questions of the embedded task; its test questions are the evaluation's own affair."""

    num_train = None
    domains: Mapping[str, int] = {}
    grader = "embedded"

    def __init__(self, settings: EmbeddedPrompts, *, seed: int) -> None:
        from distill.embedded.task import lengths_up_to

        self._lengths = lengths_up_to(settings.max_operations)
        self._seed = seed
        self.content_hash = content_hash(["distill.embedded.task", self._lengths])

    def at(self, position: int) -> Prompt:
        from distill.embedded.task import questions

        (question,) = questions(derive(self._seed, "prompts", position), 1, lengths=self._lengths, split="train")
        return Prompt(messages=({"role": "user", "content": question.text},), answer=question.answer)

    def batch(self, start: int, num: int) -> list[Prompt]:
        return [self.at(position) for position in range(start, start + num)]

    def held_out(self) -> list[Prompt]:
        return []

    def num_trained(self, prompts: Sequence[Prompt]) -> int:
        """None that is known: what is drawn is of the train split, and the task's own questions of the other."""
        return 0


class TableSource:
    """Checked prompts in columns of text, shuffled anew by the seed in every epoch."""

    grader = None

    def __init__(self, prompts: Iterator[Prompt], *, seed: int) -> None:
        import numpy as np
        import pyarrow as pa

        self._seed = seed
        columns = ("messages", *FIELDS)
        schema = pa.schema([(name, pa.large_string()) for name in columns])
        digest = hashlib.sha256()
        ids: list[str] = []
        answered: set[str] = set()
        self.domains = Counter[str]()
        chunks: list[Any] = []
        rows: list[dict[str, str | None]] = []
        for prompt in prompts:
            fields = {name: getattr(prompt, name) for name in FIELDS}
            rows.append({"messages": json.dumps([dict(message) for message in prompt.messages]), **fields})
            ids.append(prompt.id)
            if prompt.domain is not None:
                self.domains[prompt.domain] += 1
            if prompt.answer is not None:
                answered.add(prompt.id)
            digest.update(content_hash([prompt.id, fields]).encode())
            if len(rows) == _CHUNK_ROWS:
                chunks.append(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows = []
        chunks.append(pa.RecordBatch.from_pylist(rows, schema=schema))
        self.content_hash = digest.hexdigest()
        self._chunks = chunks
        held = set(sorted(answered)[: _num_held_out(len(answered), len(set(ids)))])
        if answered and not held:
            say("the prompts hold one question, which is trained on: none is held out for the examination")
        self._train = [row for row, id_ in enumerate(ids) if id_ not in held]
        self._train_hashes = np.array([_short(ids[row]) for row in self._train], dtype=np.uint64)
        # One row of each held-out question, in the order of the hashes.
        first_rows = {id_: row for row, id_ in reversed(list(enumerate(ids))) if id_ in held}
        self._held_out = [first_rows[id_] for id_ in sorted(held)]
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def num_train(self) -> int:
        return len(self._train)

    def at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._train))
        return self._row(self._order(epoch)[place])

    def batch(self, start: int, num: int) -> list[Prompt]:
        return [self.at(position) for position in range(start, start + num)]

    def held_out(self) -> list[Prompt]:
        return [self._row(row) for row in self._held_out]

    def num_trained(self, prompts: Sequence[Prompt]) -> int:
        import numpy as np

        asked = np.array([_short(prompt.id) for prompt in prompts], dtype=np.uint64)
        return int(np.isin(asked, self._train_hashes).sum())

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(self._train)
        random.Random(derive(self._seed, "prompts", epoch)).shuffle(order)
        return order

    def _row(self, row: int) -> Prompt:
        chunk, place = divmod(row, _CHUNK_ROWS)
        found = self._chunks[chunk].slice(place, 1).to_pylist()[0]
        return Prompt(messages=tuple(json.loads(found.pop("messages"))), **found)


def _short(id_: str) -> int:
    """The first 64 bits of a prompt's id: millions of them take little room."""
    return int(id_[:16], 16)


def load_prompts(
    settings: PromptSettings, *, seed: int, max_prompt_tokens: int, count_tokens: CountTokens
) -> PromptSource:
    """The prompts that ``settings`` describe, all of them read and checked.

    Raises UserError for data that cannot be used, with the file and line; DistillError where a download breaks off.
    A row of a hub set that cannot be used (it is not the user's to correct) is left out and counted aloud.
    """
    limit = _Limit(max_prompt_tokens, count_tokens)
    if isinstance(settings, EmbeddedPrompts):
        return _embedded(settings, limit, seed)
    if isinstance(settings, FilePrompts):
        return TableSource(_of_files(settings, limit), seed=seed)
    return TableSource(_of_hub(settings, limit), seed=seed)


def _embedded(settings: EmbeddedPrompts, limit: _Limit, seed: int) -> EmbeddedSource:
    # Every digit and every operator is a token: chains of as many operations are as long.
    longest = "0" + "+0" * settings.max_operations + "="
    num_tokens = limit.exceeded([{"role": "user", "content": longest}])
    if num_tokens is not None:
        raise UserError(
            f"prompts.max_operations is {settings.max_operations}, and the prompt of so long a chain has {num_tokens} "
            f"tokens, of which max_prompt_tokens allows {limit.max_tokens}; lower the first, or raise the limit with "
            f"--set max_prompt_tokens={num_tokens}"
        )
    return EmbeddedSource(settings, seed=seed)


class _Limit:
    """Refuses a prompt that is too long, counting tokens only where the bytes leave a doubt."""

    def __init__(self, max_tokens: int, count_tokens: CountTokens) -> None:
        self.max_tokens = max_tokens
        self._count_tokens = count_tokens

    def exceeded(self, messages: Sequence[Message]) -> int | None:
        """The tokens of a prompt that has too many."""
        text = "".join(str(value) for message in messages for value in message.values())
        # A token is at least one byte, and normalisation makes at most three bytes of one.
        most_bytes = len(text) if text.isascii() else 3 * len(text.encode())
        if most_bytes + _TEMPLATE_TOKENS * (1 + len(messages)) <= self.max_tokens:
            return None
        num_tokens = self._count_tokens(messages)
        return num_tokens if num_tokens > self.max_tokens else None

    def check(self, messages: Sequence[Message]) -> None:
        num_tokens = self.exceeded(messages)
        if num_tokens is not None:
            raise UserError(
                f"the prompt is {num_tokens} tokens long and max_prompt_tokens is {self.max_tokens}; "
                f"shorten or remove it, or raise the limit with --set max_prompt_tokens={num_tokens}"
            )


def _num_held_out(num_answered: int, num_prompts: int) -> int:
    if num_answered == 0:
        return 0
    wanted = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * num_answered)))
    # Something is left to train on.
    return min(wanted, num_prompts - 1)


def _of_files(settings: FilePrompts, limit: _Limit) -> Iterator[Prompt]:
    for where, prompt in file_prompts(settings):
        try:
            limit.check(prompt.messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield prompt


def _of_hub(settings: HubPrompts, limit: _Limit) -> Iterator[Prompt]:
    for hub_set in settings.sets:
        num_prompts = 0
        left_out = Counter[str]()
        for row in _hub_rows(hub_set):
            fields = {name: row[column] for name, column in _field_columns(hub_set, row).items()}
            try:
                value = _up_to_last_question(row[hub_set.prompt_column])
                prompt = prompt_of(value, {**fields, "domain": fields.get("domain") or hub_set.domain})
                limit.check(prompt.messages)
            except UserError as error:
                left_out[str(error).partition(";")[0][:100]] += 1
                continue
            num_prompts += 1
            yield prompt
        if left_out:
            reason, _ = left_out.most_common(1)[0]
            say(f"{hub_set.id}: {left_out.total()} rows are left out, for example because {reason}")
        if num_prompts == 0:
            raise UserError(
                f"{hub_set.id} holds no prompt that can be used; check its prompt_column and max_prompt_tokens"
            )


def _hub_rows(hub_set: HubSet) -> Iterator[Mapping[str, Any]]:
    import datasets

    say(f"prompts from {hub_set.id} at {hub_set.revision[:12]}, licence {hub_set.licence}")
    way_out = (
        "give prompts of your own with --prompts FILE, point HF_HOME to a cache that holds the set, "
        "or run once with a connection (for a gated set after `hf auth login`)"
    )
    try:
        table = datasets.load_dataset(hub_set.id, hub_set.subset, split=hub_set.split, revision=hub_set.revision)
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(f"the data set {hub_set.id} cannot be had: {reason_of(error)}; {way_out}") from None
    except OSError as error:
        raise DistillError(f"the data set {hub_set.id} could not be read: {reason_of(error)}; {way_out}") from error
    columns = [hub_set.prompt_column, *_field_columns(hub_set, table.column_names).values()]
    for column in columns:
        if column not in table.column_names:
            raise UserError(
                f"the data set {hub_set.id} has no column {column!r}; its columns are {', '.join(table.column_names)}"
            )
    yield from table.select_columns(columns).select(range(min(len(table), hub_set.limit or len(table))))


def _field_columns(hub_set: HubSet, there: Collection[str]) -> dict[str, str]:
    """Which column holds which field of a prompt; ``there`` are the set's columns."""
    usual = {name: name for name in FIELDS if hub_set.usual_columns and name in there}
    chosen = {name: getattr(hub_set, f"{name}_column") for name in FIELDS}
    return usual | {name: column for name, column in chosen.items() if column is not None}


def _up_to_last_question(value: Any) -> Any:
    """A hub set's conversation without the answer it ends with: the teacher and the student write their own."""
    if isinstance(value, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in value]
        return value[: len(roles) - roles[::-1].index("user")] if "user" in roles else value
    return value
