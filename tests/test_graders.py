"""Graders on real reference solutions, on answers that are equal but written otherwise, and on noise."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.errors import UserError
from eval import equality
from eval.graders import GRADERS, TASK_GRADERS, as_number, final_answer, grade, grader_of

ROOT = Path(__file__).parent.parent
# The first 400 test questions of GSM8K (OpenAI, MIT licence), as published.
GSM8K = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "gsm8k_test_first400.jsonl").read_text(encoding="utf-8").splitlines()
]


def styles(solution: str) -> tuple[str, list[str]]:
    """The reference number of a GSM8K solution, and the solution as a model would write it in several styles."""
    body, _, number = solution.partition("####")
    body, number = re.sub(r"<<.*?>>", "", body).strip(), number.strip()
    thought = "<think>\nThe answer is 999999. \\boxed{999999}\n</think>\n\n"
    return number, [
        f"{thought}{body}\n\nThe answer is $\\boxed{{{number}}}$.<|im_end|>",
        f"{thought}{body}\n#### {number}<|im_end|>",
        f"{body}\n{number}",
        f"{body}\nThe answer is {number}.",
        f"{body}\n\n**Answer:** ${number}.00 dollars",
    ]


@pytest.mark.parametrize("grader", ["gsm8k", "number"])
def test_every_style_of_a_reference_solution_is_right_and_its_neighbour_wrong(grader: str) -> None:
    num_wrong = 0
    for row in GSM8K:
        number, responses = styles(row["answer"])
        for response in responses:
            # The reference may be the whole worked solution, as the data set has it.
            num_wrong += not (grade(grader, response, number) and grade(grader, response, row["answer"]))
            num_wrong += grade(grader, response, f"{number}1")
    assert num_wrong <= 0.001 * len(GSM8K) * len(responses)


def test_only_what_follows_the_thinking_is_graded() -> None:
    assert grade("number", "<think>\n\\boxed{7}\n</think>\n\n\\boxed{8}", "8")
    assert not grade("number", "<think>\n\\boxed{7}\n</think>\n\n\\boxed{8}", "7")
    for grader in ("number", "math", "choice", "exact", "embedded"):
        assert not grade(grader, "<think>\n\\boxed{A} 7 A", "7")
        assert not grade(grader, "<think>\nA", "A")
    assert not grade("exact", "<think>\nA", ""), "open thinking is wrong even where saying nothing would be right"


def test_the_embedded_grader_is_the_tasks_own() -> None:
    assert grade("embedded", "<think>\n3+4=7\n</think>\n\n7<|im_end|>", "7")
    assert grade("embedded-4", "7<|im_end|>", "7")
    assert not grade("embedded", "<think>\n3+4=7\n</think>\n\n8<|im_end|>", "7")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("$70,000.00", "70000"),
        ("\\$32,\\!348", "32348"),
        ("-3/4", "-3/4"),
        ("\\dfrac{1}{2}", "1/2"),
        (".5", "1/2"),
        ("18 dollars per day.", "18"),
        ("x = 5", "5"),
        ("90^\\circ", "90"),
        ("12\\text{ cm}^2", "12"),
        ("33%", "33"),
        ("3\\frac{1}{2}", "7/2"),
        ("-2\\dfrac{3}{4}", "-11/4"),
        ("3 1/2 cups", "7/2"),
        ("\u22125", "-5"),
        ("3\\text{ or }4", None),
        ("2\\text{ hours }30", None),
        ("5x", None),
        ("2^{10}", None),
        ("x \\geq 5", None),
        ("1, 2", None),
        ("a=1,b=2", None),
        ("1/0", None),
        ("", None),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_numbers_are_read_exactly(text: str, value: str | None) -> None:
    number = as_number(text)
    assert (None if number is None else str(number)) == value


def test_the_final_answer_is_the_last_one_that_is_marked() -> None:
    found = final_answer("First \\boxed{1}, no: \\boxed{\\frac{1}{2}}.\nThat is 3.")
    assert found is not None and found.text == "\\frac{1}{2}"
    found = final_answer("\\boxed{1}\n#### 2\nbye")
    assert found is not None and found.text == "2"
    assert final_answer(" \n**\n") is None
    assert grade("number", "So the total is $400 + $60 = $460 for this week's work.", "460")
    assert grade("number", "It is 3 + 4.\nThe answer is -7 because 3 is left.", "-7") is False
    assert grade("number", "\\boxed{5", "5"), "a box cut off by the token limit leaves the last line"


@pytest.mark.parametrize("grader", ["number", "math"])
def test_a_number_within_a_formula_is_not_what_the_formula_says(grader: str) -> None:
    for line, right, wrong in (
        ("So the probability is $\\frac{3}{4}$.", "3/4", "4"),
        ("So the area is $12\\pi$.", "12\\pi", "12"),
        ("It is \\(2\\sqrt{3}\\)", "2\\sqrt{3}", "3"),
        ("That makes $x = \\frac{36}{2} = 18$ of them.", "18", "2"),
        ("With $\\frac{1}{2}$ of 36 she has 18.", "18", "1/2"),
        ("He needs 3 1/2 cups.", "7/2", "1/2"),
        ("It has \u22125 degrees.", "-5", "5"),
        ("\\boxed{3\\frac{1}{2}}", "3.5", "31/2"),
    ):
        assert grade(grader, line, right), line
        assert not grade(grader, line, wrong), line


def test_a_heading_is_no_answer() -> None:
    """GSM8K's mark is markdown's fourth heading too."""
    for text in (
        "#### Step 1: subtract\n16 - 7 = 9\n\n#### 2. Multiply\n9 * 2 = 18\n\nShe makes **18** dollars.",
        "\\boxed{18}\n\n#### Explanation\nThere are 9 left.",
        "It follows:\n\n#### Final Answer: 18",
        "#### **18**",
        "It comes to\n\\[\nx = 18\n\\]\n",
        "It comes to\n$$\n\\frac{36}{2} = 18\n$$\n---\n",
    ):
        assert grade("number", text, "18") and grade("gsm8k", text, "18"), text
    assert grade("math", "#### 2\\sqrt{3}\nThat is all.", "\\sqrt{12}")


def test_a_rounded_fraction_is_not_the_fraction() -> None:
    assert grade("number", "\\boxed{0.5}", "1/2")
    assert not grade("number", "\\boxed{0.333}", "1/3")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ('```json\n{"answer": "C"}\n```', "C"),
        ("\\boxed{C}", "C"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("The answer is (C).", "C"),
        ("**Answer: C**", "C"),
        ("A is wrong.\n\nC", "C"),
        ("It must be this one:\n(C) Paris", "C"),
        ("The answer is A. No, wait. The answer is C", "C"),
        ("The answer is option C.", "C"),
        ("The correct option is C", "C"),
        ("Option D is correct.", "D"),
        ("'answer': 'B'", "B"),
        ("$\\mathbf{B}$", "B"),
        ('Answer: "C"', "C"),
        ("`answer`: `C`", "C"),
        ("The answer is $C$.", "C"),
        ("The answer is \\(\\text{C}\\).", "C"),
        ("The answer is A or B.", None),
        ('{"answer": "A, B"}', None),
        ("The answer is Clear", None),
        ("I think Paris", None),
        ("", None),
    ],
)
def test_choices(text: str, letter: str | None) -> None:
    assert [option for option in "ABCD" if grade("choice", text, option)] == ([letter] if letter else [])


def test_words_forgive_case_and_where_they_stand() -> None:
    for response in ("Paris", "It lies in France.\n\nThe answer is **paris**.", "\\boxed{\\text{Paris}}", "#### PARIS"):
        assert grade("words", response, "Paris"), response
    assert grade("words", "\\boxed{7.0}", "7")
    for response in ("Lyon", "", "Paris, or Lyon"):
        assert not grade("words", response, "Paris")


def test_exact_match_forgives_white_space_only() -> None:
    assert grade("exact", "<think>\n\n</think>\n\n New  York\n", "New York")
    assert not grade("exact", "new york", "New York")


EQUAL = [
    ("\\frac{3}{56}", "3/56"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("x^2+2x", "2x + x^2"),
    ("6 - 5i", "6-5i"),
    ("10\\%", "10"),
    ("1,-2", "-2,1"),
    ("(-\\infty, 5]", "\\left(-\\infty,5\\right]"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("\\text{Evelyn}", "Evelyn"),
    ("073", "73"),
    ("\\begin{pmatrix} -1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}-1\\\\2\\end{pmatrix}"),
]
DIFFERENT = [("(3,4)", "(4,3)"), ("5", "-5"), ("1/3", "0.333"), ("x^2", "x^3"), ("\\pi", "3.14"), ("1,2", "1")]


@pytest.mark.parametrize(("reference", "written"), EQUAL)
def test_equal_mathematics_is_right(reference: str, written: str) -> None:
    assert grade("math", f"<think>\n3\n</think>\n\nSo it is $\\boxed{{{written}}}$.", reference)
    assert grade("math", f"Some steps.\nThe answer is ${written}$.", reference)


@pytest.mark.parametrize(("reference", "written"), DIFFERENT)
def test_different_mathematics_is_wrong(reference: str, written: str) -> None:
    assert not grade("math", f"\\boxed{{{written}}}", reference)


def test_a_comparison_that_never_ends_is_wrong_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "COMPARE_SECONDS", 1)
    begun = time.monotonic()
    assert not grade("math", "\\boxed{9^{9^{9^{9}}}+x}", "x+1")
    assert time.monotonic() - begun < 60
    monkeypatch.undo()
    assert grade("math", "\\boxed{1+x}", "x+1")


def test_a_busy_machine_makes_no_answer_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that a comparison may take is its own, not that which others took meanwhile."""
    monkeypatch.setattr(equality, "COMPARE_SECONDS", 1)
    worker = equality._Worker()
    assert worker.same("1+x", "x+1")
    process = worker._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    threading.Timer(2.0, process.send_signal, [signal.SIGCONT]).start()
    assert worker.same("2+x", "x+2") and worker._process is process
    worker.stop()


def test_an_interrupted_comparison_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: object, seconds: float) -> bytes:
        raise KeyboardInterrupt

    worker = equality._Worker()
    assert worker.same("1+x", "x+1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(equality, "_line", interrupted)
        worker.same("1+x", "x+1")
    assert not worker.same("1+x", "x+2"), "the first answer of the old process would have been yes"
    worker.stop()


def test_comparisons_work_beside_a_thousand_open_files(tmp_path: Path) -> None:
    (_, most) = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2048:
        pytest.skip("this machine opens too few files")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))\n"
        "held = [open('/dev/null') for _ in range(1200)]\n"
        "from eval.graders import grade\n"
        "print(grade('math', '\\\\boxed{1+x}', 'x+1'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def test_nothing_a_model_wrote_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for form in (code, f"$ {code} $", f"\\boxed{{{code}}}", f"#### {code}"):
        assert not grade("math", form, "x+1")
        assert not grade("math", form, "5")
    assert not mark.exists()


PIECES = (
    *("<think>", "</think>", "<|im_end|>", "\\boxed{", "\\boxed", "{", "}", "####", "\n", "\\frac{1}{", "/", "/0"),
    *("answer is", "answer: ", '"answer": "', "A", "(B)", "$", "\\(", "\\)", "**", "=", "-", "1,000", "3.5", ".", "%"),
    *("\u0663", "\u00b2", "\ud83d", "\x00", "\U0001f600", "9" * 400, "^", "\\circ", " ", "inf", "nan", "1e9"),
    *("\\text{", "\\sqrt", "_", "\\left(", "\\int", "\\begin{pmatrix}", "x", "&", "\\\\"),
)


def fuzzed(source: random.Random) -> str:
    """A real response with pieces put in, cut off or doubled, or nothing but pieces."""
    text = source.choice(styles(source.choice(GSM8K)["answer"])[1]) if source.random() < 0.5 else ""
    for _ in range(source.randrange(12)):
        at = source.randrange(len(text) + 1)
        text = text[:at] + source.choice(PIECES) + text[at + source.choice((0, 0, 1, 20)) :]
    return text[: source.randrange(len(text) + 1)] if source.random() < 0.2 else text


@pytest.mark.parametrize("num", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_response_makes_a_grader_raise(num: int) -> None:
    source = random.Random(num)
    names = sorted({*GRADERS, *TASK_GRADERS})
    for trial in range(num):
        response = fuzzed(source)
        answer = source.choice(["18", "1/3", "x+1", "A", "", "\\frac{1}{2}", response[:80]])
        assert grade(names[trial % len(names)], response, answer) in (True, False)


def test_noise_is_no_mathematics_for_the_real_worker_either() -> None:
    source = random.Random(1)
    pieces = [
        "\\frac",
        "{",
        "}",
        "x",
        "1",
        "^",
        "_",
        "\\sqrt",
        "(",
        ")",
        "\\int",
        "=",
        ",",
        "\\",
        "\\left",
        "\x00",
        "\u00e9",
    ]
    for _ in range(200):
        candidate = "".join(source.choices(pieces, k=source.randrange(1, 10)))
        assert grade("math", f"\\boxed{{{candidate}}}", "x+17") is False


def test_long_responses_are_graded_in_linear_time() -> None:
    begun = time.monotonic()
    for noise in (
        "\\boxed{" * 200_000,
        "#### " * 200_000,
        "1," * 500_000,
        "answer is " * 100_000,
        "$" * 500_000,
        "(" * 500_000,
    ):
        for grader in ("number", "choice", "exact"):
            grade(grader, noise, "5")
    assert time.monotonic() - begun < 20


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="math500"):
        grader_of("math_500")
    with pytest.raises(UserError, match="embedded"):
        grade("embedded-9", "7", "7")
