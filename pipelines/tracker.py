"""What a run shows to a tracker beside its own files: the metrics of every step, and the scores at its end.

Trackers are libraries that a user may have: none is needed, and the run directory holds all that a tracker is told. A
run that is resumed goes on in the tracker's same run; steps that are done again come out as before and are shown once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from distill.errors import UserError

PROJECT = "strong-to-weak"
"""Where trackio and wandb put a run; wandb's own WANDB_PROJECT wins."""

_NOT_METRICS = ("stage", "step", "global_step")


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker has to know of a run: ``num_shown`` of its steps were recorded by an earlier process of it."""

    name: str
    id: str
    folder: Path
    config: Mapping[str, Any]
    num_shown: int


class Tracker(Protocol):
    """Numbers by name, at a step of the run."""

    def show(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files below the run directory: ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))

    def show(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # A step that is in metrics.jsonl is not shown again by a resumed run, so it has to be on disk here too.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """Trackio's own database; ``trackio show`` opens it."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=_label(run), config=dict(run.config), resume="allow", embed=False)

    def show(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    """Weights & Biases, with the user's own settings (WANDB_MODE, WANDB_PROJECT, ...)."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                id=run.id,
                config=dict(run.config),
                dir=run.folder,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"wandb refuses: {error}; `wandb login`, or set WANDB_MODE=offline") from None

    def show(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
"""By the name in the configuration, which is the library's."""


def check_tracker(name: str | None) -> None:
    """Raises UserError where the library is not installed."""
    if name is not None and find_spec(name) is None:
        raise UserError(
            f"tracker is {name}, which is not installed: {shlex.quote(sys.executable)} -m pip install {name}; or set "
            "tracker to null"
        )


class Tracking:
    """The run's tracker, if it has one, fed with what the journal and the summary hold."""

    def __init__(self, tracker: Tracker | None, num_shown: int) -> None:
        self._tracker, self._num_shown = tracker, num_shown

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._tracker is not None and metrics["global_step"] > self._num_shown:
            self._tracker.show(numbers_of(metrics), metrics["global_step"])

    def scores(self, summary: Mapping[str, Any], step: int) -> None:
        """The scores of a finished run, at its last step."""
        if self._tracker is not None:
            self._tracker.show(scores_of(summary), step)


UNTRACKED = Tracking(None, 0)


@contextmanager
def tracking(name: str | None, run: Callable[[], TrackedRun]) -> Iterator[Tracking]:
    """The tracker called ``name``, told of ``run``, until the block ends. None tracks nothing."""
    if name is None:
        yield UNTRACKED
        return
    found = run()
    # Standard output is for results, and libraries greet on it.
    with redirect_stdout(sys.stderr):
        tracker = TRACKERS[name](found)
    try:
        yield Tracking(tracker, found.num_shown)
    finally:
        with redirect_stdout(sys.stderr):
            tracker.close()


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A step's numbers by name; what is null in this step has none, and the stage is a folder of names."""
    return {
        f"{metrics['stage']}/{key.replace('.', '/')}": float(value)
        for key, value in metrics.items()
        if key not in _NOT_METRICS and isinstance(value, int | float)
    }


def scores_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Each score with the ends of its 95 % interval, and the gaps that were closed."""
    found: dict[str, float] = {}
    for entry in summary["scores"]:
        budget = f"/budget-{entry['thinking_budget']}" if "thinking_budget" in entry else ""
        name = f"scores/{entry['task']}/{entry['mode']}{budget}/{entry['metric']}/{entry['checkpoint']}"
        low, high = entry["ci95"]
        found |= {name: entry["mean"], f"{name}/low": low, f"{name}/high": high}
    found |= {f"gap_closed/{mode}": share for mode, share in summary["gap_closed"].items() if share is not None}
    return found


def _label(run: TrackedRun) -> str:
    """A name of its own for every run, the same when it is resumed."""
    return f"{run.name}-{run.id[:8]}"
