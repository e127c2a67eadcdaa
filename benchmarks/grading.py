"""How often graders agree with reference solutions: `python -m benchmarks.grading FILE.jsonl ...`.

The files are GSM8K's (a worked solution that ends in `#### number`). Each solution is written as a response in several
styles and graded against its reference, and against a wrong one (the number with a digit more).
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from eval.graders import grade

THOUGHT = "<think>\nThe answer is 999999. \\boxed{999999}\n</think>\n\n"


def styles(solution: str) -> tuple[str, dict[str, str]]:
    """The reference number, and the solution as a response in each style."""
    body, _, number = solution.partition("####")
    body, number = re.sub(r"<<.*?>>", "", body).strip(), number.strip()
    endings = {
        "boxed": f"\n\nThe answer is $\\boxed{{{number}}}$.",
        "####": f"\n#### {number}",
        "plain last line": f"\n{number}",
        "answer is": f"\nThe answer is {number}.",
        "own last sentence": "",
    }
    return number, {style: f"{THOUGHT}{body}{ending}<|im_end|>" for style, ending in endings.items()}


def main(files: list[str]) -> None:
    agreed, wronged = Counter[str](), Counter[str]()
    num = 0
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            num += 1
            number, responses = styles(json.loads(line)["answer"])
            for style, response in responses.items():
                agreed[style] += grade("gsm8k", response, number)
                wronged[style] += grade("gsm8k", response, f"{number}1")
    for style, right in agreed.items():
        print(f"{style:18} {right} of {num} right; against a wrong reference {wronged[style]}")


if __name__ == "__main__":
    main(sys.argv[1:])
