"""The process in which two mathematical expressions are compared: `python -P math_worker.py SECONDS`.

SECONDS are of its own computing, so that how busy the machine is decides on no answer.

Reads one JSON pair [reference, candidate] a line, writes one line a pair: 1 (equal), 0 (not), e (neither could be
read as mathematics). Simplifying a candidate can take for ever or eat all memory, so this is a process of its own
with limits; whoever started it kills and restarts it. It imports nothing of this project. Only LaTeX is parsed (by a
grammar): the library's plain-expression parser evaluates its input as Python and is not used.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 2 * 1024**3


def compare(reference: str, candidate: str) -> str:
    """`1`, `0` or `e` for a pair; whatever the library raises means that the pair is not known to be equal."""
    config = [LatexExtractionConfig()]
    try:
        left, right = (
            parse(f"\\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (reference, candidate)
        )
        if not left or not right:
            return "e"
        return "1" if verify(left, right, timeout_seconds=None) else "0"
    except Exception:  # sympy and ANTLR raise whatever they like on model-written input
        return "e"


def main() -> None:
    seconds = int(sys.argv[1])
    # The parser complains about every text that is no LaTeX; nobody reads that, and a full pipe would block.
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    # An interrupt is the parent's to handle; it closes the pipe when it ends, and that ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The first comparison loads and builds much of what it needs: seconds that are no candidate's.
    compare("\\frac{1}{2}", "x^2+1")
    print("ready", flush=True)
    for line in sys.stdin:
        # Not handled: the signal ends this process, wherever it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


if __name__ == "__main__":
    main()
