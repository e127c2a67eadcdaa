"""Tasks: disjoint embedded questions, one's own files, rows of the hub's sets, and sentences for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.embedded.task import ask, questions, split_of
from distill.errors import UserError
from distill.types import Prompt
from eval import tasks
from eval.graders import GRADERS, grade, grader_of
from eval.tasks import BOXED, HUB_TASKS, LETTER, Task, load_task


def test_embedded_questions_are_held_out_and_a_function_of_the_seed() -> None:
    task = load_task("embedded", num_questions=100)
    texts = [prompt.messages[0]["content"] for prompt in task.prompts]
    assert len(set(texts)) == 100
    assert {split_of(text) for text in texts} == {"test"}
    assert not set(texts) & {question.text for question in questions(0, 2000, split="train")}
    assert task == load_task("embedded", num_questions=100)
    assert task != load_task("embedded", num_questions=100, seed=1)
    assert task.grader == "embedded"
    assert all(grade("embedded", str(prompt.answer), str(prompt.answer)) for prompt in task.prompts)


def test_difficulty_limits_the_operations() -> None:
    hard, easy = load_task("embedded", num_questions=200), load_task("embedded-2", num_questions=60)
    assert max(ask(prompt.messages[0]["content"]).num_operations for prompt in hard.prompts) == 8
    assert {ask(prompt.messages[0]["content"]).num_operations for prompt in easy.prompts} == {1, 2}


def own(tmp_path: Path, *rows: dict[str, Any], suffix: str = "") -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{path}{suffix}"


def test_a_file_of_ones_own_gets_the_strictest_grader_that_fits(tmp_path: Path) -> None:
    number = load_task(own(tmp_path, {"prompt": "3+4=", "answer": 7}, {"prompt": "1/2+1=", "answer": "3/2"}))
    assert (number.name, number.grader, len(number.prompts)) == ("mine", "number", 2)
    assert load_task(own(tmp_path, {"prompt": "?", "answer": "B"})).grader == "choice"
    assert (
        load_task(own(tmp_path, {"prompt": "?", "answer": "New York"}, {"prompt": "3+4=", "answer": 7})).grader
        == "words"
    )
    assert load_task(own(tmp_path, {"prompt": "?", "answer": "New York"}, suffix="@exact")).grader == "exact"
    for formula in ("\\frac{1}{2}x", "x + 1", "(1, 2)", "x = y"):
        assert tasks.suited_grader(["7", formula]) == "math"


def test_messages_language_and_domain_of_a_file_are_kept(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "3+4="}]
    task = load_task(own(tmp_path, {"prompt": turns, "answer": "7", "language": "en", "domain": "sums"}))
    assert [dict(turn) for turn in task.prompts[0].messages] == turns
    assert (task.prompts[0].language, task.prompts[0].domain) == ("en", "sums")


def test_repeated_questions_count_once_and_too_few_are_all_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = own(tmp_path, *[{"prompt": f"{n % 3}+1=", "answer": n % 3 + 1} for n in range(7)])
    task = load_task(name, num_questions=50)
    assert [prompt.answer for prompt in task.prompts] == ["1", "2", "3"]
    said = " ".join(capsys.readouterr().err.split())
    assert "4 questions more than once" in said
    assert "fewer than the 50 asked for" in said
    assert [prompt.answer for prompt in load_task(name, num_questions=2).prompts] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "answer": "b"}\nnope\n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n', "line 1 lacks prompt or answer"),
        ('{"prompt": 5, "answer": "b"}\n', "neither a text nor a list of messages"),
        ("[1]\n", "line 1 lacks prompt or answer"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        load_task(str(path))


def test_a_missing_file_and_an_unknown_grader_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="the graders are"):
        load_task("mine.jsonl@judge")


def test_held_out_prompts_are_a_task_if_they_have_answers() -> None:
    prompts = [
        Prompt(messages=({"role": "user", "content": str(n)},), answer=str(n) if n % 2 else None) for n in range(6)
    ]
    task = load_task("prompts", held_out=prompts)
    assert [prompt.answer for prompt in task.prompts] == ["1", "3", "5"]
    with pytest.raises(UserError, match="answer column"):
        load_task("prompts", held_out=prompts[:1])


@pytest.mark.parametrize(("name", "nearest"), [("math_500", "math500"), ("embeded", "embedded"), ("aime", "aime2")])
def test_an_unknown_task_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"nearest: .*{nearest}"):
        load_task(name)
    with pytest.raises(UserError, match="known: embedded, prompts, gsm8k"):
        load_task("zzzzzz")


def test_every_hub_task_is_pinned_licensed_and_graded() -> None:
    for name, task in HUB_TASKS.items():
        assert len(task.revision) == 40 and int(task.revision, 16)
        assert task.licence
        assert grader_of(name) in GRADERS
    assert len(HUB_TASKS["mmlu_redux"].subsets) == 57


def test_a_set_that_cannot_be_had_is_a_sentence_with_the_way_out() -> None:
    # The tests' environment keeps the hub out; nothing is in the cache.
    with pytest.raises(UserError, match=r"openai/gsm8k at e53f048.*ends in \.jsonl"):
        load_task("gsm8k")


ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}],
    "math500": [{"problem": "Half of one?", "answer": "\\frac{1}{2}", "solution": "..."}],
    "aime24": [{"problem": "2+2?", "answer": "004"}],
    "aime25": [{"problem": "2+2?", "answer": "4"}],
    "gpqa_diamond": [
        {
            "Question": f"Which one, {n}?",
            "Correct Answer": "right\n",
            **{f"Incorrect Answer {m}": f"wrong {m}" for m in (1, 2, 3)},
        }
        for n in range(20)
    ],
    "mmlu_redux": [
        {"question": "Which?", "choices": ["a", "b", "right", "d"], "answer": 2, "error_type": "ok"},
        {"question": "Bad?", "choices": ["a", "b", "c", "d"], "answer": 0, "error_type": "wrong_groundtruth"},
    ],
}


@pytest.mark.parametrize("name", list(HUB_TASKS))
def test_rows_of_the_hub_become_questions_whose_reference_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_rows", lambda name, task, subset: list(ROWS[name]))
    task = load_task(name)
    for prompt in task.prompts:
        text = prompt.messages[0]["content"]
        assert text.endswith(LETTER if task.grader == "choice" else BOXED)
        if task.grader == "choice":
            assert f"{prompt.answer}) right" in text
            assert grade(name, f'<think>\n\n</think>\n\n{{"answer": "{prompt.answer}"}}', str(prompt.answer))
        elif name != "math500":
            assert grade(name, "<think>\n\n</think>\n\n\\boxed{4}", str(prompt.answer))
    if name == "gpqa_diamond":
        assert {prompt.answer for prompt in task.prompts} == set("ABCD"), "the right answer stands at every place"
        assert task == load_task(name)
    if name == "mmlu_redux":
        assert all("Bad?" not in prompt.messages[0]["content"] for prompt in task.prompts)


def test_the_first_questions_of_mmlu_redux_are_of_all_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str, task: tasks.HubTask, subset: str | None) -> list[dict[str, Any]]:
        return [
            {"question": f"{subset} {n}?", "choices": list("abcd"), "answer": 0, "error_type": "ok"} for n in (1, 2)
        ]

    monkeypatch.setattr(tasks, "_rows", rows)
    task = load_task("mmlu_redux", num_questions=57)
    assert len({prompt.messages[0]["content"].split()[0] for prompt in task.prompts}) == 57


def test_a_task_without_answers_is_a_programming_mistake() -> None:
    with pytest.raises(AssertionError):
        Task("x", (Prompt(messages=({"role": "user", "content": "a"},)),), "exact")
