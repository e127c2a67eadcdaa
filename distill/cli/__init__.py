"""The door: the command ``distill``, one module per noun.

Standard output carries results only (with ``--json``, one JSON document); progress and errors go
to standard error. A user's error is one sentence and exit code 2, a failure 1, a clean stop 75, Ctrl-C 130. Heavy
modules are imported by the command that needs them, so that ``--help`` answers at once. The one corner of this package
that may import the packages above it.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from distill.cli import config, queue, responses, schedule, teacher
from distill.cli.compare import compare
from distill.cli.doctor import doctor
from distill.cli.evaluate import evaluate
from distill.cli.export import export
from distill.cli.init import init
from distill.cli.launch import launch
from distill.cli.plan import plan
from distill.cli.preview import preview
from distill.cli.report import report
from distill.cli.run import run
from distill.cli.worker import worker
from distill.errors import DistillError, GuardError, NonFiniteError, PeerError, StoppedError
from distill.progress import complain, say

app = typer.Typer(
    help="Make a small Qwen3 strong: distil a large one into it, off-policy and then on-policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Strong-to-weak distillation (Qwen3 Technical Report, section 4.5)."""


app.command()(run)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(report)
app.command()(compare)
app.command()(init)
app.command()(preview)
app.command()(doctor)
app.command()(export)
app.add_typer(config.app, name="config")
app.add_typer(teacher.app, name="teacher")
app.add_typer(responses.app, name="responses")
app.add_typer(schedule.app, name="schedule")
app.add_typer(queue.app, name="queue")
app.command()(worker)
app.command()(launch)


def main() -> None:
    """The console script: sentences instead of tracebacks for what is no bug."""
    _leave(_exit_code())


def _exit_code() -> int:
    """Have the command work; the code to leave with."""
    try:
        app()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except PeerError as error:
        return error.exit_code
    except DistillError as error:
        # What all processes of a run meet at once, the main one says; what one meets alone, that one.
        shared = isinstance(error, StoppedError | NonFiniteError | GuardError)
        (say if shared else complain)(f"distill: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("distill: interrupted")
        return 130
    return 0


def _leave(code: int) -> NoReturn:
    ranks = sys.modules.get("students.ranks")
    if ranks is not None and ranks.has_joined:
        # Threads of the process group may outlive it, and C++ aborts a process that ends with one of them alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
