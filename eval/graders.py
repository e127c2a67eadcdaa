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
# "#### Step 1" and "#### 2. Multiply" are headings, and no answers in GSM8K's form.
_HEADING = re.compile(r"[*_ \t]*(?:[A-Za-z]{2,}|\d+[.)][ \t]+\S)")
_PHRASE = re.compile(r"(?i:\banswer)\**(?:\s+(?:is|was|should be|must be)\b|\s*[:=])\s*:?\s*(.+)")
_INLINE = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_LATEX = re.compile(r"\\(?!boxed)[A-Za-z]|[\^_]")
_MARKUP = " \t\r\n*`_$\\[]()-"
"""What a line that says nothing is made of: emphasis, fences, rules, the ends of formulas."""
# A hyphen after a letter, digit or bracket is a dash or a minus between two terms, not this number's sign.
_DIGITS = r"(?:\d+ (?=\d+/\d))?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\d.])\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-+]\\?\$?)?(?:{_DIGITS})")
_EQUALS = re.compile(rf"=\s*((?:[-+]\s*)?\\?\$?\s*(?:[-+]\s*)?(?:{_DIGITS}))")


def final_answer(text: str) -> Found | None:
    """The last `\\boxed{...}` or `####`, whichever comes later; else the last line, from "answer is" on; else None.

    A `####` before a word is a heading, unless nothing follows.
    """
    text = _with_ascii_minus(text)
    boxed_at, boxed = _last_box(text)
    hashed = _last_hashes(text)
    if hashed is not None and hashed.start() > boxed_at:
        return Found(_from_phrase_on(hashed[1]), marked=True)
    if boxed is not None:
        return Found(boxed.strip(), marked=True)
    line = next((line for line in reversed(text.splitlines()) if line.strip(_MARKUP)), None)
    return None if line is None else Found(_from_phrase_on(line), marked=False)


def _from_phrase_on(line: str) -> str:
    phrase = _last(_PHRASE, line)
    return (line if phrase is None else phrase[1]).replace("**", "").strip()


def _last_hashes(text: str) -> re.Match[str] | None:
    """The last line in GSM8K's form."""
    end = len(text.rstrip(_MARKUP))
    found = reversed(list(_HASHES.finditer(text)))
    return next((match for match in found if match.end() >= end or not _HEADING.match(match[1])), None)


def _with_ascii_minus(text: str) -> str:
    """The minus of typography is a minus; read as a dash it would take a number's sign away."""
    return text.replace("\u2212", "-")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None


def as_number(text: str) -> Fraction | None:
    """The rational number that a short text is: `18`, `$70,000.00`, `-3/4`, `3\\frac{1}{2}`, `18 dollars`, `x = 5`."""
    if len(text) > 200:
        return None
    text = re.sub(r"^[^=,;<>!\\]*=", "", text)
    # With a space in its place: what stands on both sides of a unit or before a fraction is no one number.
    text = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?", " ", text)
    text = re.sub(r"\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\!\s*|\\,|\^\{?\\circ\}?|\\?[$%]|[\u20ac\u00a3]|\\[()]", "", text.replace("{,}", ","))
    match = re.fullmatch(
        r"\s*([-+]?)\s*(?:(\d+)\s+(?=\d+\s*/))?(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?(?:\s*/\s*(\d+))?"
        r"\s*\.?(?:\s+[A-Za-z][A-Za-z .]+)?\s*",
        _with_ascii_minus(text),
    )
    if match is None or not (match[3] or match[4]):
        return None
    digits = match[3].replace(",", "") + (match[4] or "")
    denominator = int(match[5] or 1)
    if denominator == 0:
        return None
    value = int(match[2] or 0) + Fraction(digits if match[3] else f"0{digits}") / denominator
    return -value if match[1] == "-" else value


def _found_number(found: Found) -> Fraction | None:
    value = as_number(found.text)
    if value is not None or found.marked:
        return value
    formula = _last(_INLINE, found.text)
    if formula is not None and _LATEX.search(formula[0][1:-1]) and not _NUMBER.search(found.text, formula.end()):
        # The 4 of \frac{3}{4} and the 12 of 12\pi are no answers.
        return as_number(_expression(found).rpartition("=")[2])
    # Running text: what the last equation comes to, else the last number.
    numbers = _EQUALS.findall(found.text) or _NUMBER.findall(found.text)
    return as_number(numbers[-1]) if numbers else None


def _expression(found: Found) -> str:
    """What of a final answer is mathematics: in running text the last formula, if there is one."""
    formula = None if found.marked else _last(_INLINE, found.text)
    return found.text.rstrip(".") if formula is None else next(filter(None, formula.groups())).strip()


def _reference(answer: str) -> str:
    """The final answer of a reference, which may be a whole worked solution in GSM8K's form."""
    return _with_ascii_minus(answer.rpartition("####")[2].strip())


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
        rf"{_NOUN}[*`]*(?:\s+(?i:is|should be|must be)\b|\s*[:=])\s*:?[\s*]*(?i:option|choice)?"
        rf"[\s*`\"'$]*(?:\\\()?{_STYLE}{_LETTER}{_ALONE}"
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
