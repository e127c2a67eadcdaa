"""What a tracker is told: every step once, also of a run that was resumed, and the scores; never on standard output.

The real libraries are in the extra ``dev``, trackio aside, whose needs cannot stand beside vLLM's (pyproject.toml): a
double with its signatures takes its place, and is held against it where it is installed (extra ``trackers``).
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.journal import Journal
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run
from pipelines.tracker import TRACKERS, numbers_of, scores_of

SMALL = (
    "stages.off_policy.num_prompts=16",
    "stages.off_policy.batch_size=8",
    "stages.off_policy.epochs=1",
    "stages.on_policy.steps=2",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=4",
    "checkpoint_every=1",
)


def tracked(out: Path, tracker: str) -> dict[str, Any]:
    config = resolve_run(assignments=[*SMALL, f"store={out.parent}/store", f"tracker={tracker}"])
    return run(config, out, command=["a test"])


def forget_the_end(out: Path) -> None:
    """As a kill after the third of the four steps, whose successor was recorded, leaves the run."""
    for name in ("student", "checkpoints/step_4"):
        shutil.rmtree(out / name)
    for path in (out / "summary.json", *out.glob("eval/on_policy-*")):
        path.unlink()


RECORDING = """
import json, os
def _note(**what):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def init(project, name=None, *, config=None, resume="never", embed=True):
    print("hello from a library")
    _note(init={"project": project, "name": name, "resume": resume}, seed=config["seed"])
def log(metrics, step=None): _note(step=step, values=metrics)
def finish(): _note(finished=True)
"""


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A trackio that writes down what it is told."""
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "trackio.py").write_text(RECORDING)
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    real = sys.modules.pop("trackio", None)
    yield tmp_path / "record"
    sys.modules.pop("trackio", None)
    if real is not None:
        sys.modules["trackio"] = real


def test_every_step_and_the_scores_are_shown_once(
    recording: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    summary = tracked(out, "trackio")
    told = [json.loads(line) for line in recording.read_text().splitlines()]
    identity = json.loads((out / "manifest.json").read_text())["id"]
    assert told[0]["init"] == {"project": "strong-to-weak", "name": f"tiny-to-nano-{identity[:8]}", "resume": "allow"}
    assert [one["step"] for one in told[1:-1]] == [1, 2, 3, 4, 4] and told[-1] == {"finished": True}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for metrics, one in zip(steps, told[1:5], strict=True):
        assert one["values"] == numbers_of(metrics)
    assert told[5]["values"] == scores_of(summary)
    forget_the_end(out)
    tracked(out, "trackio")
    again = [json.loads(line) for line in recording.read_text().splitlines()][len(told) :]
    assert again[0] == told[0]
    # The fourth step was done anew, and had been shown.
    assert [one["step"] for one in again[1:-1]] == [4] and again[1]["values"] == scores_of(summary)
    # A finished run is read back: nothing is left to show.
    before = recording.read_text()
    tracked(out, "trackio")
    assert recording.read_text() == before
    captured = capfd.readouterr()
    assert captured.out == "" and "hello from a library" in captured.err


def test_a_run_may_change_its_tracker_while_it_rests(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tracked(out, "null")
    assert not recording.exists()
    config = resolve_run(assignments=[*SMALL, f"store={tmp_path}/store", "tracker=trackio"])
    Journal(out, config).close()


def test_numbers_are_named_by_stage_and_mode() -> None:
    metrics = {
        "stage": "on_policy",
        "step": 0,
        "global_step": 7,
        "loss": 0.5,
        "think.reverse_kl": 0.25,
        "no_think.reverse_kl": None,
        "num_tokens": 3,
    }
    expected = {"on_policy/loss": 0.5, "on_policy/think/reverse_kl": 0.25, "on_policy/num_tokens": 3.0}
    assert numbers_of(metrics) == expected
    entry = {
        "checkpoint": "start",
        "task": "gsm8k",
        "mode": "think",
        "metric": "avg@1",
        "mean": 0.5,
        "ci95": [0.4, 0.6],
    }
    budgeted = {**entry, "thinking_budget": 64, "mean": 0.25}
    found = scores_of({"scores": [entry, budgeted], "gap_closed": {"think": 0.9, "no_think": None}})
    assert found["scores/gsm8k/think/avg@1/start"] == 0.5 and found["scores/gsm8k/think/avg@1/start/low"] == 0.4
    assert found["scores/gsm8k/think/budget-64/avg@1/start"] == 0.25
    assert {name: value for name, value in found.items() if name.startswith("gap")} == {"gap_closed/think": 0.9}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_a_sentence_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tracker.find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    with pytest.raises(UserError, match=f"-m pip install {name}") as refused:
        tracked(tmp_path / "run", name)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_tensorboard_itself(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    summary = tracked(out, "tensorboard")
    forget_the_end(out)
    tracked(out, "tensorboard")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(scores_of(summary)) <= names
    shown = [(one.step, one.value) for one in events.Scalars("on_policy/loss")]
    assert [step for step, _ in shown] == [3, 4]
    assert [value for _, value in shown] == pytest.approx([line["loss"] for line in steps[2:]])


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read once, when the library is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    double: dict[str, Any] = {}
    exec(RECORDING, double)
    for function in ("init", "log", "finish"):
        known = inspect.signature(getattr(trackio, function)).parameters
        for name, parameter in inspect.signature(double[function]).parameters.items():
            assert parameter.default == known[name].default, (function, name)

    out = tmp_path / "run"
    summary = tracked(out, "trackio")
    forget_the_end(out)
    tracked(out, "trackio")
    (name,) = SQLiteStorage.get_runs("strong-to-weak")
    logs = SQLiteStorage.get_logs("strong-to-weak", name)
    assert sorted(one["step"] for one in logs) == [1, 2, 3, 4, 4, 4]
    assert set(scores_of(summary)) <= set(logs[-1])


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked(tmp_path / "run", "wandb")
    identity = json.loads((tmp_path / "run" / "manifest.json").read_text())["id"]
    (folder,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}")
    assert list(folder.glob("*.wandb"))
