"""Whether a response is right: one dictionary of graders, and nothing a model wrote is ever executed.

Only what stands after `</think>` is graded; a response whose thinking never closes is wrong. A grader returns False
for whatever it cannot read and raises on no response. Left out on purpose: graders that ask a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from distill.chat import split_thinking
from distill.embedded.task import grade as grade_embedded
from distill.errors import UserError
from eval import equality

Grader = Callable[[str, str], bool]
"""(the answer part of a response, the reference answer) -> right or wrong"""

_LONGEST_ANSWER = 1000
"""A final answer longer than this many characters is none."""


def grade(task: str, response: str, answer: str) -> bool:
    """Whether ``response`` (the whole text, thinking included) gives ``answer``.

    ``task`` is the name of a task or of a grader. Raises UserError for an unknown one and never on a response.

    >>> grade("number", "<think>\\n16 - 7 = 9\\n</think>\\n\\nShe makes 9 * 2 = $18.00 every day.", "18")
    True
    """
    grader = GRADERS[grader_of(task)]
    parts = split_thinking(response)
    return parts.closed and grader(parts.answer, answer)


def grader_of(task: str) -> str:
    """The name of the grader of a task (or of a grader itself). Raises UserError, naming the nearest, if unknown."""
    if task in GRADERS:
        return task
    if task in TASK_GRADERS:
        return TASK_GRADERS[task]
    if re.fullmatch(r"embedded-[1-8]", task):
        return "embedded"
    known = [*GRADERS, *TASK_GRADERS]
    near = difflib.get_close_matches(task, known, n=2, cutoff=0.4) or known
    raise UserError(f"no grader is known for {task!r}; nearest: {', '.join(near)} (graders: {', '.join(GRADERS)})")


def exact(text: str, answer: str) -> bool:
    """The whole answer is the reference, white space aside."""
    return " ".join(text.split()) == " ".join(answer.split())


def choice(text: str, answer: str) -> bool:
    """The letter last chosen: `"answer": "C"`, a box, "the answer is C", or a last line that is a lettered option."""
    letter = _last_choice(text)
    return letter is not None and letter == answer.strip().strip("()").upper()


def number(text: str, answer: str) -> bool:
    """The final answer is the same rational number, exactly: 0.5 is 1/2, 0.333 is not 1/3.

    A reference that is no number is compared as text.
    """
    found = final_answer(text)
    if found is None:
        return False
    reference = _reference(answer)
    wanted = as_number(reference)
    if wanted is None:
        return _plain(_expression(found)) == _plain(reference)
    return wanted == _found_number(found)


def words(text: str, answer: str) -> bool:
    """The final answer is the same number or the same words, letter case and spacing aside."""
    found = final_answer(text)
    if found is None:
        return False
    return number(text, answer) or _plain(found.text).casefold() == _plain(_reference(answer)).casefold()


def math(text: str, answer: str) -> bool:
    """``number``, and where either side is more than a number: equal as mathematics (math-verify, in a worker).

    Percent signs are left to math-verify as well, which takes 50 % for 50 and for 0.5.
    """
    if number(text, answer):
        return True
    found = final_answer(text)
    if found is None:
        return False
    reference, candidate = _reference(answer), _expression(found)
    both_numbers = as_number(reference) is not None and _found_number(found) is not None
    if (both_numbers and "%" not in candidate + reference) or len(candidate) > _LONGEST_ANSWER:
        return False
    return equality.equal(reference, candidate)


GRADERS: dict[str, Grader] = {
    "embedded": grade_embedded,
    "number": number,
    "words": words,
    "math": math,
    "choice": choice,
    "exact": exact,
}

TASK_GRADERS = {
    "gsm8k": "math",
    "math500": "math",
    "aime24": "math",
    "aime25": "math",
    "gpqa_diamond": "choice",
    "mmlu_redux": "choice",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A final answer: ``marked`` as one (`\\boxed{}`, `####`), or read off running text in the last line."""

    text: str
    marked: bool


_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(r"(?i:\banswer)\**(?:\s+(?:is|was|should be|must be)\b|\s*[:=])\s*:?\s*(.+)")
_INLINE = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
# A hyphen after a letter, digit or bracket is a dash or a minus between two terms, not this number's sign.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\d.])\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-+]\\?\$?)?(?:{_DIGITS})")
_EQUALS = re.compile(rf"=\s*((?:[-+]\s*)?\\?\$?\s*(?:[-+]\s*)?(?:{_DIGITS}))")


def final_answer(text: str) -> Found | None:
    """The last `\\boxed{...}` or `####`, whichever comes later; else the last line, from "answer is" on; else None."""
    boxed_at, boxed = _last_box(text)
    hashed = _last(_HASHES, text)
    if hashed is not None and hashed.start() > boxed_at:
        return Found(hashed[1].strip(), marked=True)
    if boxed is not None:
        return Found(boxed.strip(), marked=True)
    line = next((line for line in reversed(text.splitlines()) if line.strip(" \t*`_")), None)
    if line is None:
        return None
    phrase = _last(_PHRASE, line)
    return Found((line if phrase is None else phrase[1]).replace("**", "").strip(), marked=False)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None


def as_number(text: str) -> Fraction | None:
    """The rational number that a short text is: `18`, `$70,000.00`, `-3/4`, `\\frac{1}{2}`, `18 dollars`, `x = 5`."""
    if len(text) > 200:
        return None
    text = re.sub(r"^[^=,;<>!\\]*=", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?", "", text)
    text = re.sub(r"\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"\\!\s*|\\,|\^\{?\\circ\}?|\\?[$%]|[\u20ac\u00a3]|\\[()]", "", text.replace("{,}", ","))
    match = re.fullmatch(
        r"\s*([-+]?)\s*(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?(?:\s*/\s*(\d+))?\s*\.?(?:\s+[A-Za-z][A-Za-z .]+)?\s*", text
    )
    if match is None or not (match[2] or match[3]):
        return None
    digits = match[2].replace(",", "") + (match[3] or "")
    denominator = int(match[4] or 1)
    if denominator == 0:
        return None
    value = Fraction(digits if match[2] else f"0{digits}") / denominator
    return -value if match[1] == "-" else value


def _found_number(found: Found) -> Fraction | None:
    value = as_number(found.text)
    if value is not None or found.marked:
        return value
    # Running text: what the last equation comes to, else the last number.
    numbers = _EQUALS.findall(found.text) or _NUMBER.findall(found.text)
    return as_number(numbers[-1]) if numbers else None


def _expression(found: Found) -> str:
    """What of a final answer is mathematics: in running text the last formula, if there is one."""
    formula = None if found.marked else _last(_INLINE, found.text)
    return found.text.rstrip(".") if formula is None else next(filter(None, formula.groups())).strip()


def _reference(answer: str) -> str:
    """The final answer of a reference, which may be a whole worked solution in GSM8K's form."""
    return answer.rpartition("####")[2].strip()


def _plain(text: str) -> str:
    """LaTeX without what does not change its meaning, for a comparison letter by letter."""
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:| )|\s|\$", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


def _last_box(text: str) -> tuple[int, str | None]:
    """Place and content of the last `\\boxed{...}` whose braces close; (-1, None) without one."""
    at = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if at < 0:
        return -1, None
    start = text.index("{", at)
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return at, text[start + 1 : place]
    return -1, None


_LETTER = r"\(?([A-Z])\)?(?![A-Za-z])"
# "A or B" and "A, C" choose nothing.
_ALONE = r"(?!\s*(?:,|/|&|\bor\b|\band\b)\s*\(?[A-Z]\b)"
_STYLE = r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?"
_NOUN = r"(?i:\b(?:answer|option|choice))"
_CHOICES = (
    re.compile(rf"[\"'](?i:answer)[\"']\s*:\s*[\"']?{_LETTER}{_ALONE}"),
    re.compile(rf"\\boxed\{{\s*{_STYLE}\s*{_LETTER}{_ALONE}"),
    re.compile(
        rf"{_NOUN}\**(?:\s+(?i:is|should be|must be)\b|\s*[:=])\s*:?[\s*]*(?i:option|choice)?[\s*]*{_LETTER}{_ALONE}"
    ),
    re.compile(rf"(?i:\b(?:option|choice))\s+{_LETTER}\s+(?i:is\s+(?:the\s+)?(?:correct|right))\b"),
)
_OPTION = re.compile(rf"[\s*($]*{_STYLE}([A-Z])(?:[*).:}}]+.*|\s*)\$?\s*")


def _last_choice(text: str) -> str | None:
    found: list[tuple[int, str]] = []
    for pattern in _CHOICES:
        found += [(match.start(1), match[1]) for match in pattern.finditer(text)]
    if found:
        return max(found)[1]
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    option = _OPTION.fullmatch(line)
    return option[1] if option else None
