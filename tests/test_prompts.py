"""Prompt sources: order is a function of the seed and the position, and bad data is named by its line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from distill import prompts as prompts_module
from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.embedded.task import ask, split_of
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.prompt_config import EmbeddedPrompts, FilePrompts, HubPrompts, HubSet
from distill.prompts import PromptSource, load_prompts
from distill.types import Message, Prompt
from pipelines.resolution import resolve_run


def words(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def load(path: Path, *, seed: int = 0, column: str = "prompt", max_prompt_tokens: int = 1000) -> PromptSource:
    source = FilePrompts(path=str(path), prompt_column=column)
    return load_prompts(source, seed=seed, max_prompt_tokens=max_prompt_tokens, count_tokens=words)


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def everything(source: PromptSource) -> list[Prompt]:
    assert source.num_train is not None
    return source.batch(0, source.num_train)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        user("a"),
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        user("c"),
    ]
    file = jsonl(
        tmp_path / "p.jsonl",
        [
            {"prompt": "caf\u00e9 /no_think"},
            {"prompt": turns, "mode": "think", "language": "en", "domain": "chat"},
        ],
    )
    found = {len(prompt.messages): prompt for prompt in everything(load(file))}
    assert found[1] == Prompt((user("caf\u00e9 /no_think"),), mode="no_think")
    assert found[4] == Prompt(tuple(turns), mode="think", language="en", domain="chat")


@pytest.mark.parametrize(
    ("answer", "text"), [(7, "7"), (7.0, "7"), (0.5, "0.5"), ("x y", "x y"), (None, None), (10**400, "1" + "0" * 400)]
)
def test_answers_are_text_or_numbers(tmp_path: Path, answer: object, text: str | None) -> None:
    (prompt,) = everything(load(jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "answer": answer}])))
    assert prompt.answer == text


def test_the_order_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {number}"} for number in range(50)])
    one, same, other = load(file, seed=1), load(file, seed=1), load(file, seed=2)
    order = [prompt.id for prompt in one.batch(0, 150)]
    assert [same.at(position).id for position in reversed(range(150))] == order[::-1]
    assert [prompt.id for prompt in one.batch(40, 30)] == order[40:70]
    epochs = [order[:50], order[50:100], order[100:]]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [prompt.id for prompt in other.batch(0, 50)] != epochs[0]


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A resumed run may meet another version of this code: positions must not move."""
    file = jsonl(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(8)])
    found = [prompt.messages[0]["content"] for prompt in load(file, seed=3).batch(0, 16)]
    assert "".join(found) == PINNED_ORDER


PINNED_ORDER = "0321547634572061"


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q{number}", "answer": number} for number in range(200)]
    source = load(jsonl(tmp_path / "p.jsonl", [*rows, *rows[:100], {"prompt": "no answer"}]))
    held = [prompt.id for prompt in source.held_out()]
    trained = {prompt.id for prompt in everything(source)}
    assert len(held) == len(set(held)) == 10
    assert not trained & set(held)
    assert len(trained) == 191
    assert all(prompt.answer is not None for prompt in source.held_out())
    again = load(jsonl(tmp_path / "reversed.jsonl", rows[::-1]), seed=9)
    assert [prompt.id for prompt in again.held_out()] == held


@pytest.mark.parametrize(("num", "num_held"), [(1, 0), (2, 1), (30, 2), (12_000, 500)])
def test_how_many_are_held_out(tmp_path: Path, num: int, num_held: int) -> None:
    source = load(jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{number}", "answer": "a"} for number in range(num)]))
    assert len(source.held_out()) == num_held
    assert source.num_train == num - num_held
    assert len({prompt.id for prompt in everything(source)}) == num - num_held


def test_what_is_trained_on_is_known_of_a_question(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "answer": "a"} for number in range(40)]
    source = load(jsonl(tmp_path / "p.jsonl", rows))
    others = [Prompt((user("new"),)), Prompt((user("q3 "),))]
    assert source.num_trained([*everything(source), *others]) == source.num_train == 38
    assert source.num_trained(source.held_out()) == source.num_trained(others) == source.num_trained([]) == 0


def test_a_single_question_is_not_held_out_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "q", "answer": "a"}
    assert load(jsonl(tmp_path / "p.jsonl", [row, row])).held_out() == []
    assert "none is held out" in capsys.readouterr().err
    assert load(jsonl(tmp_path / "p.jsonl", [row, {"prompt": "r", "answer": "a"}])).held_out() != []
    assert load(jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}])).held_out() == []
    assert "held out" not in capsys.readouterr().err


def test_prompts_without_answers_are_all_trained_on(tmp_path: Path) -> None:
    source = load(jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{number}"} for number in range(100)]))
    assert (source.num_train, source.held_out()) == (100, [])


def test_parquet_jsonl_and_folders_agree(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user(f"q{number}")], "answer": number if number % 2 else None, "mode": "think"}
        for number in range(9000)
    ]
    rows[5]["prompt"] = [{"role": "system", "content": "s", "reasoning_content": "x"}, user("five")]
    lines = load(jsonl(tmp_path / "p.jsonl", rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    table = load(tmp_path / "p.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", rows[:4000])
    parquet.write_table(pa.Table.from_pylist(rows[4000:]), folder / "b.parquet")
    (folder / "README.md").write_text("not prompts")
    assert lines.content_hash == table.content_hash == load(folder).content_hash
    assert everything(lines) == everything(table) == everything(load(folder))
    rows[0]["answer"] = 1
    assert load(jsonl(tmp_path / "p.jsonl", rows)).content_hash != lines.content_hash


def test_columns_that_are_not_used_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "anwser": 1}]))
    assert "not used: anwser" in capsys.readouterr().err
    load(jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "answer": 1}, {"prompt": "r", "answer": 1}]))
    assert capsys.readouterr().err == ""


GOOD = '{"prompt": "q"}\n'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{'prompt': 'q'}", "line 2 is not JSON"),
        ('{"prompt": "q"', "line 2 is not JSON"),
        ("What is 3+4?", "line 2 is not JSON"),
        ('{"prompt": "q", "answer": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("7" * 5000, "line 2 is not JSON"),
        ('["q"]', "line 2 holds a list"),
        ('{"question": "q", "a": 1}', "line 2: there is no column 'prompt'; the columns are question, a"),
        ("{}", "the columns are none"),
        ('{"prompt": 3}', "line 2: the prompt is a value of type int"),
        ('{"prompt": null}', "line 2: the prompt is null"),
        ('{"prompt": " "}', "the text of message 1 is empty"),
        ('{"prompt": []}', "empty list"),
        ('{"prompt": ["q"]}', "message 1 is a text"),
        ('{"prompt": [{"from": "human", "value": "q"}]}', "message 1 has the keys from, value; it needs role and"),
        ('{"prompt": [{"role": "human", "content": "q"}]}', "the role 'human'; it is one of system, user"),
        ('{"prompt": [{"role": "user", "content": [{"text": "q"}]}]}', "only text"),
        ('{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', "from 'assistant'"),
        ('{"prompt": [{"role": ["user"], "content": "q"}]}', "the role ['user']"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "q", "answer": ""}', "answer is empty"),
        ('{"prompt": "q", "answer": true}', "answer is true or false"),
        ('{"prompt": "q", "answer": 1e999}', "answer is a value of type float"),
        ('{"prompt": "q", "answer": ["a"]}', "answer is a list"),
        ('{"prompt": "q", "mode": "thinking"}', "mode is 'thinking'; it is think, no_think"),
        ('{"prompt": "q", "mode": ["think"]}', "mode is ['think']"),
        ('{"prompt": "q /think", "mode": "no_think"}', "mode is no_think and a message says /think"),
        ('{"prompt": "q", "language": 3}', "language is a value of type int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(UserError) as error:
        load(file)
    assert f"{file}, line 2" in str(error.value)
    assert sentence in str(error.value)


def test_a_long_prompt_is_named_with_its_length(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    jsonl(file, [{"prompt": "q"}, {"prompt": "word " * 100_000}])
    with pytest.raises(UserError, match=r"line 2: the prompt is 100000 tokens long and max_prompt_tokens is 8192"):
        load(file, max_prompt_tokens=8192)
    jsonl(file, [{"prompt": "word " * 8192}])
    assert load(file, max_prompt_tokens=8192).num_train == 1


def test_tokens_are_counted_wherever_the_bytes_leave_a_doubt() -> None:
    """The worst text for the shortcut: every byte a token, and a normalisation that triples them."""
    for text in ("x" * 3000, "\U0001d160" * 900):
        counted: list[int] = []

        def count(messages: Sequence[Message], counted: list[int] = counted) -> int:
            counted.append(len(messages))
            return 0

        prompts_module._Limit(3000, count).check([user(text)])
        assert counted == [1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\n", "line 1 is not JSON")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "p.jsonl")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode().rstrip())
    assert load(tmp_path / "p.jsonl").num_train == 2


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match=r"there is no file .*promts\.jsonl; did you mean prompts\.jsonl\?"):
        load(tmp_path / "promts.jsonl")
    with pytest.raises(UserError, match=r"its folder .*nowhere does not exist either"):
        load(tmp_path / "nowhere" / "p.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .*empty holds no \.jsonl or \.parquet file"):
        load(tmp_path / "empty")


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    file.write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"cannot be read as parquet"):
        load(file)
    parquet.write_table(pa.table({"question": ["q"]}), file)
    with pytest.raises(UserError, match=r"no column 'prompt'; the columns are question"):
        load(file)
    assert load(file, column="question").num_train == 1
    parquet.write_table(pa.table({"prompt": ["q", " "]}), file)
    with pytest.raises(UserError, match=r"p\.parquet, row 2: the text of message 1 is empty"):
        load(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot be read as parquet"):
        load(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
keys = st.sampled_from(["prompt", "answer", "mode", "language", "domain", "role", "content"])
messages = st.lists(st.dictionaries(st.sampled_from(["role", "content", "reasoning_content"]), json_values), max_size=3)
rows = st.dictionaries(keys, json_values | messages) | json_values


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=60), max_size=4))
@example(content=[b'{"prompt": "\\ud800"}'])
@example(content=[b'{"\\ud800": "q"}'])
def test_whatever_a_file_holds_it_is_prompts_or_a_sentence(tmp_path: Path, content: list[bytes]) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\n".join(content))
    try:
        source = load(file)
    except UserError as error:
        str(error).encode()
    else:
        assert len(source.batch(0, 5)) == 5


def test_embedded_prompts_are_fresh_train_questions() -> None:
    def questions(seed: int, start: int) -> list[Prompt]:
        source = load_prompts(EmbeddedPrompts(), seed=seed, max_prompt_tokens=100, count_tokens=words)
        assert (source.num_train, source.held_out()) == (None, [])
        return source.batch(start, 200)

    first = questions(0, 0)
    assert questions(0, 100)[:100] == first[100:]
    assert questions(1, 0) != first
    texts = [prompt.messages[0]["content"] for prompt in first]
    assert all(split_of(text) == "train" for text in texts)
    assert [ask(text).answer for text in texts] == [prompt.answer for prompt in first]
    assert len(set(texts)) > 150
    short = load_prompts(EmbeddedPrompts(max_operations=1), seed=0, max_prompt_tokens=100, count_tokens=words)
    assert {len(prompt.messages[0]["content"]) for prompt in short.batch(0, 50)} == {4}


def test_embedded_prompts_that_are_too_long_are_refused() -> None:
    count = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher")))).count_tokens

    def load(most: int, operations: int) -> PromptSource:
        settings = EmbeddedPrompts(max_operations=operations)
        return load_prompts(settings, seed=0, max_prompt_tokens=most, count_tokens=count)

    for operations in (2, 8):
        longest = max(count(prompt.messages) for prompt in load(1000, operations).batch(0, 200))
        assert load(longest, operations).num_train is None
        sentence = rf"prompts\.max_operations is {operations}, .* has {longest} tokens, .* allows {longest - 1}; lower"
        with pytest.raises(UserError, match=sentence):
            load(longest - 1, operations)


def hub(**fields: Any) -> HubPrompts:
    required = {"id": "owner/name", "revision": "0" * 40, "licence": "mit", **fields}
    return HubPrompts(sets=(HubSet(**required),))


def test_a_hub_set_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"owner/name cannot be had: .*; give prompts of your own.*HF_HOME.*connection"):
        load_prompts(hub(), seed=0, max_prompt_tokens=100, count_tokens=words)


def test_hub_sets_are_read_to_their_last_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands in for the hub: `datasets` reads both through the same call."""
    import datasets

    rows = [
        {"messages": [user("one"), {"role": "assistant", "content": "1"}], "lang": "en", "gold": "1"},
        {"messages": [user("two two")], "lang": "de", "gold": None},
        {"messages": [user("")], "lang": "de", "gold": None},
        {"messages": [user("long " * 2000)], "lang": "de", "gold": None},
        {"messages": [user("beyond the limit")], "lang": "de", "gold": None},
    ]
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    real = datasets.load_dataset

    def from_folder(name: str, subset: str | None, *, split: str, revision: str) -> object:
        assert (name, subset, split, revision) == ("owner/name", None, "train", "0" * 40)
        return real(str(tmp_path / "data"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    columns = {"prompt_column": "messages", "answer_column": "gold", "language_column": "lang"}
    source = load_prompts(hub(**columns, domain="chat", limit=4), seed=0, max_prompt_tokens=100, count_tokens=words)
    found = {prompt.language: prompt for prompt in everything(source) + source.held_out()}
    assert found["en"] == Prompt((user("one"),), answer="1", language="en", domain="chat")
    assert found["de"] == Prompt((user("two two"),), language="de", domain="chat")
    heard = capsys.readouterr().err
    assert "licence mit" in heard
    assert "2 rows are left out" in heard
    with pytest.raises(UserError, match=r"has no column 'prompt'; its columns are messages, lang, gold"):
        load_prompts(hub(), seed=0, max_prompt_tokens=100, count_tokens=words)


def test_a_hub_set_on_the_command_line_brings_its_usual_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [{"prompt": text, "mode": mode, "domain": "maths"} for text, mode in (("a b", "think"), ("c d", None))]
    jsonl(tmp_path / "test.jsonl", rows)
    real = datasets.load_dataset

    def from_folder(name: str, subset: str | None, *, split: str, revision: str) -> object:
        assert (name, subset, split, revision) == ("owner/name", None, "test", "v1.0")
        return real("json", data_files=str(tmp_path / "test.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    config = resolve_run(prompts="owner/name@v1.0:test")
    source = load_prompts(config.prompts, seed=0, max_prompt_tokens=100, count_tokens=words)
    found = {str(prompt.messages[0]["content"]): (prompt.mode, prompt.domain) for prompt in everything(source)}
    assert found == {"a b": ("think", "maths"), "c d": (None, "maths")}
    # A file of one's own is never taken for a set.
    assert resolve_run(prompts="owner/name").prompts.kind == "file"
