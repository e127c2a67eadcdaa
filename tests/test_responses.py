"""Looking into a store of real responses: counts against the responses themselves, forced tokens, damage, JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import cli
from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.family import resolve
from distill.repetition import repetition
from distill.sampler import TransformersSampler
from distill.types import MODES, Prompt, Rollout, Sampling
from teachers.store import ResponseStore, TeacherIdentity, response_key

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
ENCODER = Encoder(load_tokenizer(TEACHER))
IDENTITY = TeacherIdentity(TEACHER.revision, ENCODER.template_hash, ENCODER.vocabulary_hash, name="tiny")


@pytest.fixture(scope="module")
def said() -> list[Rollout]:
    """Two samples to each of twelve questions, with a thinking budget that some exceed and a limit that some reach."""
    sampler = TransformersSampler(load_model(TEACHER, torch.float32, "cpu"), ENCODER, speaker="tiny")
    return sampler.generate(
        [
            ENCODER.request(
                Prompt(({"role": "user", "content": "+".join("347251864"[: 2 + number % 8]) + "="},)),
                mode=MODES[number % 2],
                sampling=Sampling(40, thinking_budget=12),
                seed=2 * number + sample,
            )
            for number in range(12)
            for sample in range(2)
        ]
    )


@pytest.fixture
def root(tmp_path: Path, said: list[Rollout]) -> Path:
    store = ResponseStore(tmp_path / "store")
    store.put(IDENTITY, said[:10], run="first")
    store.put(IDENTITY, said[10:], run="second")
    return store.root


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["distill", "responses", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    heard = capsys.readouterr()
    return int(stopped.value.code or 0), heard.out, heard.err


def document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = call(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_repetition_is_that_of_counting() -> None:
    for ids in ([], [1] * 4, [1] * 9, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 1, 2, 3, 4], list(range(50)) * 2):
        grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
        repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
        assert repetition(ids) == pytest.approx(repeated / len(grams) if len(grams) > 1 else 0.0)


def test_ls_counts_what_is_there(
    root: Path, said: list[Rollout], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = document(monkeypatch, capsys, "ls", "--store", str(root))["collections"]
    assert (found["teacher"], found["revision"]) == ("tiny", TEACHER.revision)
    assert found["sampling"] == {**found["sampling"], "max_new_tokens": 40, "thinking_budget": 12}
    assert (found["num_responses"], found["num_shards"], found["broken_shards"]) == (24, 2, [])
    assert found["num_tokens"] == sum(len(one.response_ids) for one in said)
    assert found["num_bytes"] == sum(file.stat().st_size for file in root.glob("*/part-*"))
    code, out, _ = call(monkeypatch, capsys, "ls", "--store", str(root))
    assert code == 0 and "tiny" in out and "thinking_budget 12" in out


def test_a_store_that_nobody_has_written_to_yet_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    for command, key in (("ls", "collections"), ("show", "responses"), ("stats", "collections")):
        assert document(monkeypatch, capsys, command) == {"store": str(tmp_path / "none"), key: []}
        assert document(monkeypatch, capsys, command, "--store", str(tmp_path / "empty"))[key] == []
    assert "there is no store of responses in" in call(monkeypatch, capsys, "stats")[2]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["ls", "show", "stats"])
def test_a_store_that_is_named_has_to_be_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for name, says in (("none", "is not there"), ("file", "is no folder"), ("file/below", "is not there")):
        for more in ((), ("--json",)):
            code, out, err = call(monkeypatch, capsys, command, "--store", str(tmp_path / name), *more)
            assert (code, out) == (2, "") and f"{name} {says}; name another with --store" in " ".join(err.split())
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "file"))
    assert call(monkeypatch, capsys, command)[0] == 2


def test_show_gives_the_text_and_marks_what_was_forced(
    root: Path, said: list[Rollout], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(one for one in said if any(one.forced))
    key = response_key(IDENTITY, one.request)
    (found,) = document(monkeypatch, capsys, "show", key[:12], "--store", str(root))["responses"]
    assert (found["key"], found["mode"], found["run"] in ("first", "second")) == (key, one.mode, True)
    assert found["messages"] == [dict(message) for message in one.request.prompt.messages]
    assert [piece["forced"] for piece in found["pieces"]][:2] == [False, True]
    assert "Considering the limited time" in found["pieces"][1]["text"]
    assert "".join(piece["text"] for piece in found["pieces"]) == ENCODER.decode(one.response_ids)
    assert found["num_forced"] == sum(one.forced)
    assert found["mean_logprob"] == pytest.approx(np.mean(one.logprobs), abs=1e-6)
    _, out, _ = call(monkeypatch, capsys, "show", key[:12], "--store", str(root))
    assert "[forced: " in out and found["messages"][0]["content"] in out
    shown = document(monkeypatch, capsys, "show", "--first", "5", "--store", str(root))["responses"]
    assert [row["key"] for row in shown] == sorted(response_key(IDENTITY, one.request) for one in said)[:5]


def test_what_is_not_there_is_a_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "show", "zz", "--store", str(root), "--json")
    assert (code, out) == (2, "") and "no key in" in err and "'zz'" in err
    code, _, err = call(monkeypatch, capsys, "stats", "--collection", "235B", "--store", str(root))
    assert code == 2 and "'235B'" in err and "tiny-" in err


def test_statistics_are_those_of_the_responses(
    root: Path, said: list[Rollout], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = document(monkeypatch, capsys, "stats", "--store", str(root))["collections"]
    assert set(found["modes"]) == set(MODES)
    for mode, figures in found["modes"].items():
        group = [one for one in said if one.mode == mode]
        lengths = [len(one.response_ids) for one in group]
        assert (figures["num_responses"], figures["num_prompts"]) == (12, 4)
        assert figures["length"]["mean"] == pytest.approx(sum(lengths) / 12)
        assert figures["length"]["p50"] == pytest.approx(np.median(lengths)) and figures["length"]["max"] == max(
            lengths
        )
        assert figures["truncation"] == sum(one.finish_reason == "length" for one in group) / 12
        assert figures["closure"] == sum(map(ENCODER.closed_thinking, group)) / 12
        assert figures["forced"] == sum(any(one.forced) for one in group) / 12
        assert figures["repetition"]["max"] == max(repetition(one.response_ids) for one in group)
    assert found["modes"]["think"]["forced"] > 0
    code, out, _ = call(monkeypatch, capsys, "stats", "--store", str(root))
    assert code == 0 and "no_think" in out


def test_looking_names_a_damaged_shard_and_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(root.glob("*/part-*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-200])
    for command in ("ls", "stats"):
        (found,) = document(monkeypatch, capsys, command, "--store", str(root))["collections"]
        assert found["broken_shards"] == [shard.name]
    assert shard.exists()
    left = document(monkeypatch, capsys, "show", "--first", "100", "--store", str(root))["responses"]
    assert len(left) in (10, 14)


def test_without_the_teachers_tokenizer_there_are_ids_and_the_reason(
    tmp_path: Path, said: list[Rollout], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, reason in (("Qwen/Qwen3-4B", "not in the hub's cache"), ("tiny", "no longer the one")):
        store = ResponseStore(tmp_path / name.replace("/", "-"))
        store.put(replace(IDENTITY, name=name, tokenizer_hash="another"), said[:4])
        shown = document(monkeypatch, capsys, "show", "--store", str(store.root))["responses"]
        assert all(row["pieces"] is None and reason in row["no_text"] for row in shown), shown[0]["no_text"]
        (figures,) = document(monkeypatch, capsys, "stats", "--store", str(store.root))["collections"]
        assert figures["modes"]["think"]["closure"] is None and reason in figures["no_closure"]
        assert reason in call(monkeypatch, capsys, "show", "--store", str(store.root))[1]
