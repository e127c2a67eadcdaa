"""Tasks: disjoint embedded questions, one's own files, rows of the hub's sets, and sentences for what is wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from distill.embedded.task import ask, questions, split_of
from distill.errors import UserError
from distill.evaluation_config import TaskSettings
from distill.recipe import parse_yaml, validate
from distill.types import MODES, Prompt
from eval import published, tasks
from eval.graders import GRADERS, grade, grader_of
from eval.published import BOXED, LETTER, PUBLISHED, Published
from eval.tasks import Task, load_task


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
    plain = load_task(own(tmp_path, {"prompt": "3+4=", "answer": "7", "language": "en"}))
    assert plain.prompts[0].language == "en"


def test_a_mode_that_is_not_kept_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ({"prompt": "3+4=", "answer": "7", "mode": "think"}, {"prompt": "1+1= /no_think", "answer": "2"})
    load_task(own(tmp_path, *rows, {"prompt": "2+2=", "answer": "4"}))
    assert "the task mine: 2 prompts name a mode; they are asked in every mode" in capsys.readouterr().err


def test_two_lines_of_a_recipe_make_a_task_of_ones_own(tmp_path: Path) -> None:
    path = own(tmp_path, {"prompt": "3+4=", "answer": "7"}, {"prompt": "Half?", "answer": "1/2"})
    recipe = f"evaluation:\n  tasks:\n    - path: {path}\n      grader: math\n"
    (wanted,) = validate(parse_yaml(recipe, where="here")).evaluation.tasks or ()
    task = load_task(wanted)
    assert (task.name, task.grader, len(task.prompts)) == ("mine", "math", 2)
    # Everything else that a task can be set to.
    columns = tmp_path / "other.jsonl"
    columns.write_text('{"q": "3+4=", "solution": "7", "language": "fr"}\n{"q": "1+1=", "solution": "2"}\n')
    task = load_task(
        TaskSettings(
            path=str(columns),
            prompt_column="q",
            answer_column="solution",
            instruction={"no_think": "At once."},
            label="sums",
            samples=8,
            pass_at=(4,),
            num_questions=1,
            modes=("no_think",),
        ),
        num_questions=2,
    )
    assert (task.name, task.samples, task.pass_at, task.modes, len(task.prompts)) == ("sums", 8, (4,), ("no_think",), 1)
    (prompt,) = task.prompts
    assert task.asked(prompt, "think") == prompt
    assert task.asked(prompt, "no_think").messages[0]["content"] == "3+4=\n\nAt once."
    assert (prompt.answer, prompt.language) == ("7", "fr")


def test_a_task_is_a_name_or_a_path_and_what_it_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    for tree, sentence in (
        ({}, "a task needs a name or a path"),
        ({"pth": "x"}, "did you mean path"),
        ({"name": "gsm8k", "samples": 0}, "samples"),
    ):
        with pytest.raises(UserError, match=sentence):
            validate({"evaluation": {"tasks": [tree]}})
    with pytest.raises(UserError, match="takes no path"):
        load_task(TaskSettings(name="embedded", path="x.jsonl"))
    with pytest.raises(UserError, match="the graders are"):
        load_task(TaskSettings(path="x.jsonl", grader="judge"))


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
        ("", "holds no prompt"),
        ('{"prompt": "a", "answer": "b"}\nnope\n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n', "line 1 has no answer"),
        ('{"answer": "a"}\n', "line 1: there is no column 'prompt'"),
        ('{"prompt": 5, "answer": "b"}\n', "it is a text or a list of messages"),
        ("[1]\n", "line 1 holds a list"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        load_task(str(path))


def test_a_missing_file_and_an_unknown_grader_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
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
    for name, task in PUBLISHED.items():
        assert len(task.revision) == 40 and int(task.revision, 16)
        assert task.licence
        assert grader_of(name) in GRADERS
    assert len(PUBLISHED["mmlu_redux"].subsets) == 57


def test_a_set_that_cannot_be_had_is_a_sentence_with_the_way_out() -> None:
    # The tests' environment keeps the hub out; nothing is in the cache.
    with pytest.raises(UserError, match=r"e53f048.*--data PATH, for a run .*\{name: gsm8k, path: PATH\}"):
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


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_rows_of_a_set_become_questions_whose_reference_is_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_download", lambda name, set_, subset: list(ROWS[name]))
    task = load_task(name)
    for mode in MODES:
        for prompt in task.prompts:
            text = task.asked(prompt, mode).messages[0]["content"]
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
    # The report's: 64 responses of up to 38,912 tokens to a question of AIME.
    assert (task.samples, task.max_new_tokens) == ((64, 38912) if name.startswith("aime") else (1, 32768))
    local = load_task(TaskSettings(name=name, path=str(as_jsonl(tmp_path / "copy.jsonl", ROWS[name]))))
    assert [prompt.id for prompt in local.prompts] == [prompt.id for prompt in task.prompts]
    assert (local.grader, local.instructions, local.samples) == (task.grader, task.instructions, task.samples)


def test_a_local_copy_is_a_file_or_a_folder_in_any_of_the_hubs_forms(tmp_path: Path) -> None:
    rows = ROWS["gsm8k"]
    as_jsonl(tmp_path / "a" / "main" / "test-00000-of-00001.jsonl", rows)
    as_jsonl(tmp_path / "a" / "main" / "train-00000-of-00001.jsonl", [{"question": "train", "answer": "#### 1"}])
    as_jsonl(tmp_path / "b" / "anything.jsonl", rows)
    (tmp_path / "c").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c" / "test.parquet")
    copies = [load_task(TaskSettings(name="gsm8k", path=str(tmp_path / folder))) for folder in "abc"]
    assert copies[0] == copies[1] == copies[2]
    assert [prompt.messages[0]["content"] for prompt in copies[0].prompts] == ["2+2?"]
    # GPQA lies on the hub as CSV files of which one is the diamond set.
    (tmp_path / "gpqa").mkdir()
    for file, chosen in (("gpqa_diamond.csv", ROWS["gpqa_diamond"]), ("gpqa_main.csv", ROWS["gpqa_diamond"][:1])):
        with (tmp_path / "gpqa" / file).open("w", newline="") as lines:
            writer = csv.DictWriter(lines, [*chosen[0], "High-level domain"])
            writer.writeheader()
            writer.writerows({**row, "High-level domain": "Physics"} for row in chosen)
    task = load_task(TaskSettings(name="gpqa_diamond", path=str(tmp_path / "gpqa")))
    assert len(task.prompts) == 20 and {prompt.domain for prompt in task.prompts} == {"Physics"}


def test_what_is_wrong_with_a_local_copy_is_a_sentence(tmp_path: Path) -> None:
    for name, path, sentence in (
        ("gsm8k", tmp_path / "none", "no file or folder"),
        ("gsm8k", as_jsonl(tmp_path / "x.jsonl", [{"q": "a"}]), "needs? the columns that openai/gsm8k"),
        ("gsm8k", as_jsonl(tmp_path / "empty.jsonl", []), "has no questions"),
        ("gsm8k", as_jsonl(tmp_path / "d" / "readme.md", []).parent, "holds no .jsonl"),
        ("mmlu_redux", as_jsonl(tmp_path / "m" / "anatomy" / "test.jsonl", []).parent.parent, "no folder abstract"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_task(TaskSettings(name=name, path=str(path)))


def test_the_first_questions_of_mmlu_redux_are_of_all_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str, set_: Published, subset: str | None) -> list[dict[str, Any]]:
        return [
            {"question": f"{subset} {n}?", "choices": list("abcd"), "answer": 0, "error_type": "ok"} for n in (1, 2)
        ]

    monkeypatch.setattr(published, "_download", rows)
    task = load_task("mmlu_redux", num_questions=57)
    assert len({prompt.messages[0]["content"].split()[0] for prompt in task.prompts}) == 57
    assert {prompt.domain for prompt in task.prompts} == set(PUBLISHED["mmlu_redux"].subsets)


def test_a_task_without_answers_is_a_programming_mistake() -> None:
    with pytest.raises(AssertionError):
        Task("x", (Prompt(messages=({"role": "user", "content": "a"},)),), "exact")
