"""A preview shows what the run then does: the same prompts, ids, modes and mask."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.chat import EARLY_STOP
from distill.checkpoint import open_checkpoint, tokenizer_in
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.prompts import load_prompts
from distill.stage_config import OffPolicyStage
from distill.types import Request, Rollout
from pipelines.crew import teacher_requests
from pipelines.faculty import find_teachers
from pipelines.preview import SURVEYED, preview, print_preview
from pipelines.resolution import resolve_run
from teachers.store import ResponseStore

TINY = open_checkpoint(resolve("tiny", role="teacher"))
ENCODER = Encoder(tokenizer_in(TINY.path))


def asked(num: int, **keys: Any) -> tuple[Any, list[Request]]:
    """The configuration, and the first requests of its off-policy stage as a run makes them."""
    config = resolve_run(assignments=[f"{key}={value}" for key, value in keys.items()])
    prompts = load_prompts(config.prompts, seed=config.seed, max_prompt_tokens=256, count_tokens=ENCODER.count_tokens)
    settings = config.stages["off_policy"]
    assert isinstance(settings, OffPolicyStage)
    batch = prompts.batch(0, num)
    return config, teacher_requests(batch, settings, ENCODER, seed=config.seed, stage="off_policy", first=0)


def test_a_stage_is_shown_with_what_it_will_read(tmp_path: Path) -> None:
    config, requests = asked(3, store=tmp_path)
    document = preview(config, num=3)
    off, on = document["stages"]
    assert (off["stage"], off["kind"], off["speaker"], off["num_prompts"]) == (
        "off_policy",
        "off_policy",
        "teacher",
        1024,
    )
    assert (on["speaker"], on["num_prompts"], on["num_surveyed"]) == ("student", 240 * 64, SURVEYED)
    # The second stage goes on behind the first one's prompts.
    assert [shown["position"] for shown in on["prompts"]] == [1024, 1025, 1026]
    for shown, request in zip(off["prompts"], requests, strict=True):
        assert (shown["id"], shown["mode"], shown["switch"]) == (request.prompt.id, request.mode, request.switch)
        assert shown["prompt_tokens"] == len(request.prompt_ids) == shown["pieces"][0]["tokens"]
        assert shown["pieces"][0] == {
            "text": ENCODER.decode(request.prompt_ids),
            "tokens": len(request.prompt_ids),
            "trained": False,
        }
        assert shown["response"] == "form"
    counts = {mode: sum(switches.values()) for mode, switches in off["modes"].items()}
    assert counts == {"think": SURVEYED // 2, "no_think": SURVEYED // 2}
    lengths = off["prompt_tokens"]
    assert lengths["min"] <= lengths["mean"] <= lengths["max"] <= 256
    assert document["no_responses"] is None


def test_a_run_that_begins_further_on_shows_its_own_prompts(tmp_path: Path) -> None:
    config = asked(3, store=tmp_path)[0].model_copy(update={"first_prompt": 100})
    off, on = preview(config, num=1)["stages"]
    assert [off["prompts"][0]["position"], on["prompts"][0]["position"]] == [100, 1124]


def test_a_stored_response_is_shown_with_its_mask(tmp_path: Path) -> None:
    config, requests = asked(1, store=tmp_path)
    ids = [*ENCODER.tokenizer.encode("3+4=7", add_special_tokens=False), ENCODER.stop_ids[0]]
    forced = tuple(place in (1, 2) for place in range(len(ids)))
    rollout = Rollout(requests[0], tuple(ids), forced, (0.0,) * len(ids), "stop", "tiny")
    ResponseStore(tmp_path).put(find_teachers(config)[0].identity(ENCODER), [rollout])
    shown = preview(config, num=2, stage="off_policy")["stages"][0]["prompts"]
    assert [one["response"] for one in shown] == ["stored", "form"]
    pieces = shown[0]["pieces"]
    assert [(piece["tokens"], piece["trained"]) for piece in pieces[1:]] == [
        (1, True),
        (2, False),
        (len(ids) - 3, True),
    ]
    assert "".join(piece["text"] for piece in pieces[1:]) == ENCODER.decode(ids)


def test_the_form_of_a_response_says_what_is_trained(tmp_path: Path) -> None:
    """Hard non-thinking has the empty block in the prompt, soft in the response; forced tokens carry no loss."""
    budget = "stages.on_policy.sampling.think.thinking_budget"
    config, _ = asked(1, store=tmp_path, **{budget: 24, "stages.on_policy.mixture.soft_switch_share": 0.5})
    shown = preview(config, num=40, stage="on_policy")["stages"][0]["prompts"]
    block = "<think>\n\n</think>\n\n"
    kinds = {(one["mode"], one["switch"]) for one in shown}
    assert kinds == {(mode, switch) for mode in ("think", "no_think") for switch in ("hard", "soft")}
    for one in shown:
        prompt, *response = one["pieces"]
        if one["mode"] == "think":
            assert [piece["text"] for piece in response if not piece["trained"]] == [EARLY_STOP]
            assert block not in prompt["text"]
        else:
            assert prompt["text"].endswith(block) is (one["switch"] == "hard")
            assert response[0]["text"].startswith(block) is (one["switch"] == "soft")
            assert all(piece["trained"] for piece in response)


def test_a_small_file_of_prompts_is_shown_as_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"{n}+1= [bold]", "answer": str(n + 1)}) + "\n" for n in range(8)))
    config = resolve_run(prompts=str(own), assignments=[f"store={tmp_path}"])
    document = preview(config, num=1)
    assert (document["num_train"], document["num_held_out"]) == (7, 1)
    assert [stage["num_prompts"] for stage in document["stages"]] == [7, 240 * 64]
    print_preview(document)
    shown = capsys.readouterr().out
    assert "[bold]" in shown and "no loss" in shown and "held out: 1" in shown


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    config = resolve_run(assignments=[f"store={tmp_path}"])
    with pytest.raises(UserError, match="none of the run's stages: off_policy, on_policy"):
        preview(config, stage="grpo")


def test_preview_as_it_is_typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from distill import cli

    monkeypatch.setattr(sys, "argv", ["distill", "preview", "--json", "--first", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    document = json.loads(capfd.readouterr().out)
    assert not stopped.value.code
    assert set(document) == {"teacher", "num_train", "num_held_out", "stages", "no_responses"}
    keys = {"stage", "kind", "speaker", "num_prompts", "num_surveyed", "modes", "prompt_tokens", "prompts"}
    assert all(set(stage) == keys for stage in document["stages"])
    one = {"position", "id", "mode", "switch", "answer", "prompt_tokens", "max_new_tokens", "response", "pieces"}
    assert set(document["stages"][0]["prompts"][0]) == one
