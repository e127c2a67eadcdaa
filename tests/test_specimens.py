"""The recorded tokens: their divergences are the real ones, and the training does not notice that they were taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.checkpoint import load_model, open_checkpoint
from distill.embedded.tokenizer import build_tokenizer
from distill.encode import Encoder
from distill.family import resolve
from distill.types import Prompt
from pipelines.phases import reproducible
from pipelines.resolution import resolve_run
from pipelines.specimens import NUM_PROMPTS, Specimens, pieces
from pipelines.strong_to_weak import run

SMALL = (
    "stages.off_policy.num_prompts=16",
    "stages.off_policy.batch_size=8",
    "stages.off_policy.epochs=1",
    "stages.on_policy.steps=2",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=2",
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_run(out: Path, *more: str) -> None:
    run(resolve_run(assignments=[*SMALL, f"store={out.parent}/store", *more]), out, command=["a test"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("specimens") / "run"
    small_run(out)
    return out


def test_the_same_questions_are_recorded_in_both_modes_before_and_after_the_stage(finished: Path) -> None:
    samples = lines(finished / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0] * 2 * NUM_PROMPTS + [2] * 2 * NUM_PROMPTS
    assert {sample["stage"] for sample in samples} == {"on_policy"}
    before, after = (
        [(sample["prompt_id"], sample["mode"]) for sample in samples if sample["step"] == step] for step in (0, 2)
    )
    assert before == after and len(set(before)) == 2 * NUM_PROMPTS
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["kl"]) == len(sample["logprob"]) > 0
        assert min(sample["kl"]) > -1e-6 and max(sample["logprob"]) <= 0


def test_the_recorded_divergences_are_those_of_the_naive_formula(finished: Path) -> None:
    teacher = load_model(open_checkpoint(resolve("tiny", role="teacher")), torch.float32, torch.device("cpu")).double()
    student = AutoModelForCausalLM.from_pretrained(finished / "student").double()
    encoder = Encoder(build_tokenizer())
    num_tokens = 0
    for sample in lines(finished / "samples.jsonl")[2 * NUM_PROMPTS :]:
        prompt = Prompt(({"role": "user", "content": sample["prompt"]},))
        prompt_ids = list(encoder.encode(prompt, mode=sample["mode"], switch="hard"))
        response_ids = encoder.tokenizer.encode("".join(sample["tokens"]), add_special_tokens=False)
        if len(response_ids) != len(sample["tokens"]):
            continue  # the student said what no tokenizer would
        with torch.no_grad():
            q_RV, p_RV = (
                model(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
                for model in (student, teacher)
            )
        chosen = q_RV.gather(1, torch.tensor(response_ids)[:, None])[:, 0]
        # The stop tokens are one action.
        stops = list(encoder.stop_ids)
        merged_q, merged_p = (
            torch.cat(
                [x_RV[:, [v for v in range(x_RV.shape[1]) if v not in stops]], x_RV[:, stops].logsumexp(-1, True)], 1
            )
            for x_RV in (q_RV, p_RV)
        )
        kl_R = (merged_q.exp() * (merged_q - merged_p)).sum(-1)
        assert torch.tensor(sample["kl"]) == pytest.approx(kl_R.tolist(), rel=2e-3, abs=2e-5)
        assert sample["logprob"] == pytest.approx(chosen.tolist(), rel=2e-3, abs=2e-5)
        num_tokens += len(response_ids)
    assert num_tokens > 8


def test_the_training_does_not_notice(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Specimens, "take", lambda self, *arguments, **places: None)
    small_run(tmp_path / "run", f"store={finished.parent}/store")
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    ours, theirs = (
        [reproducible(line) for line in lines(out / "metrics.jsonl")] for out in (tmp_path / "run", finished)
    )
    assert ours == theirs
    weights = (path / "student" / "model.safetensors" for path in (tmp_path / "run", finished))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_token_has_its_own_text_and_together_they_are_the_response() -> None:
    encoder = Encoder(build_tokenizer())
    text = "<think>\n3+4=7\n</think>\n\n7<|im_end|>"
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    texts = pieces(ids, encoder)
    assert "".join(texts) == text and texts[0] == "<think>" and texts[-1] == "<|im_end|>"


class Bytes:
    """An encoder whose tokens are single bytes, as byte-level tokenizers have for rare characters."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["a\u00e9z", "\u65e5\u672c", "\U0001f600!"])
def test_a_character_of_several_tokens_belongs_to_the_last_of_them(text: str) -> None:
    texts = pieces(list(text.encode()), Bytes())  # type: ignore[arg-type]
    assert len(texts) == len(text.encode()) and "".join(texts) == text and "\ufffd" not in "".join(texts)


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    assert "".join(pieces([0x61, 0xFF, 0xFF, 0xFF, 0xFF, 0x62], Bytes())) == "a\ufffd\ufffd\ufffd\ufffdb"  # type: ignore[arg-type]
