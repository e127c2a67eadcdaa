"""Examinations: with a scripted sampler every number is known; with the real one, the batch changes nothing."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from distill.embedded.tokenizer import build_tokenizer
from distill.encode import Encoder
from distill.errors import DistillError, GoneError, StoppedError, UserError
from distill.family import Shape
from distill.sampler import OnFinished
from distill.types import MODES, Prompt, Request, Rollout, Sampling
from eval import samples as sample_module
from eval.evaluation import Evaluation
from eval.runner import evaluate
from eval.tasks import Task, load_task
from pipelines.verifier import Verifier

SAMPLING = Sampling(max_new_tokens=40, temperature=0.6, top_p=0.95, top_k=20)
SHAPE = Shape(2, 2, 1, 16, 32, 64, 320, True)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


class Scripted:
    """Says what ``script`` says to a request; stops like a person after ``num_calls`` calls if told to."""

    def __init__(self, encoder: Encoder, script: Callable[[Request], str], num_calls: int | None = None) -> None:
        self.encoder, self.script, self.num_calls = encoder, script, num_calls
        self.seen: list[Request] = []
        self.calls = 0

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if self.calls == self.num_calls:
            raise StoppedError("stopped by SIGTERM", exit_code=75)
        self.calls += 1
        self.seen += requests
        rollouts = []
        for request in requests:
            ids = tuple(self.encoder.tokenizer.encode(self.script(request), add_special_tokens=False))
            cut = len(ids) > request.sampling.max_new_tokens
            ids = ids[: request.sampling.max_new_tokens]
            rollout = Rollout(
                request, ids, (False,) * len(ids), (0.0,) * len(ids), "length" if cut else "stop", speaker="scripted"
            )
            rollouts.append(rollout)
            if on_finished is not None:
                on_finished(rollout)
        return rollouts


def task_of(*answers: str, grader: str = "number") -> Task:
    prompts = tuple(
        Prompt(messages=({"role": "user", "content": f"question {n}"},), answer=answer)
        for n, answer in enumerate(answers)
    )
    return Task("sums", prompts, grader)


def right(request: Request) -> str:
    return f"<think>\n1+1=2\n</think>\n\n{request.prompt.answer}<|im_end|>"


def run(encoder: Encoder, task: Task, sampler: Scripted, **changes: object) -> Evaluation:
    settings = {"sampling": SAMPLING, "samples": 1, "seed": 0, "checkpoint": "start", **changes}
    return evaluate(task, "think", sampler=sampler, encoder=encoder, **settings)  # type: ignore[arg-type]


def test_scores_lengths_and_rates_by_hand(encoder: Encoder) -> None:
    def script(request: Request) -> str:
        question = request.prompt.messages[0]["content"]
        return {
            "question 0": "<think>\n1+1=2\n</think>\n\n7<|im_end|>",
            "question 1": "<think>\n\n</think>\n\n9<|im_end|>",
            "question 2": "<think>\n" + "1+1=2\n" * 20,
            "question 3": "7<|im_end|>",
        }[question]

    result = run(encoder, task_of("7", "8", "2", "7"), Scripted(encoder, script), shape=SHAPE)
    assert list(result.scores.values()) == [(1.0,), (0.0,), (0.0,), (1.0,)]
    assert list(result.metrics) == ["avg@1"]
    assert result.metrics["avg@1"].mean == 0.5
    # Open thinking, and in thinking mode a response that never closed a block, count as not closed.
    assert (result.closure, result.truncation, result.nonempty_thinking) == (0.5, 0.25, 0.5)
    # <think> \n 1+1=2 \n </think> \n\n 7 <|im_end|> is 12 tokens, the empty block 6, the cut one 40, the bare answer 2.
    assert result.num_tokens == 12 + 6 + 40 + 2
    assert result.mean_length == 15.0
    assert result.mean_thinking_length == (9 + 3 + 40 + 0) / 4
    assert result.num_broken == 0
    assert result.flops is not None and result.flops > 2 * SHAPE.active_parameters * result.num_tokens


def test_thinking_that_the_prompt_opened_is_no_answer_until_it_is_closed() -> None:
    """Templates of models that always think end the prompt with the tag; the response never holds it."""
    tokenizer = build_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template += "{{- '<think>\\n' -}}"
    encoder = Encoder(tokenizer)
    said = {"question 0": "1+1=7\n", "question 1": "1+1=2\n</think>\n\n7<|im_end|>"}

    def script(request: Request) -> str:
        return said[request.prompt.messages[0]["content"]]

    sampler = Scripted(encoder, script)
    result = run(encoder, task_of("7", "7"), sampler)
    assert list(result.scores.values()) == [(0.0,), (1.0,)]
    assert (result.num_unclosed, result.closure, result.nonempty_thinking) == (1, 0.5, 1.0)
    assert result.mean_thinking_length == (6 + 7) / 2
    assert Verifier("number", encoder).verdicts(sampler.generate(sampler.seen[:2])) == [False, True]


def test_entries_are_the_summarys_interface(encoder: Encoder) -> None:
    def script(request: Request) -> str:
        return right(request) if request.seed % 2 else "0<|im_end|>"

    result = run(encoder, task_of(*"1234567"), Scripted(encoder, script), samples=4)
    for entry, metric in zip(result.entries, ("avg@4", "pass@4"), strict=True):
        assert list(entry) == ["checkpoint", "task", "mode", "metric", "mean", "ci95", "num_questions", "num_samples"]
        assert entry["metric"] == metric
        assert (entry["checkpoint"], entry["task"], entry["mode"]) == ("start", "sums", "think")
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
        assert (entry["num_questions"], entry["num_samples"]) == (7, 28)
    rows = list(result.scores.values())
    assert result.metrics["avg@4"].mean == pytest.approx(sum(map(sum, rows)) / 28)
    assert result.metrics["pass@4"].mean == pytest.approx(sum(map(any, rows)) / 7)


def test_a_samples_seed_depends_on_seed_question_and_number_alone(encoder: Encoder) -> None:
    task = task_of(*"1234")
    backwards = Task("sums", task.prompts[::-1], task.grader)

    def seeds(task: Task, **changes: object) -> dict[tuple[str, int], int]:
        sampler = Scripted(encoder, right)
        run(encoder, task, sampler, samples=3, **changes)
        return {(request.prompt.id, place % 3): request.seed for place, request in enumerate(sampler.seen)}

    assert len(set(seeds(task).values())) == 12
    assert seeds(task) == seeds(backwards) == seeds(task, chunk=5)
    assert not set(seeds(task).values()) & set(seeds(task, seed=1).values())


def test_files_hold_every_sample_and_are_read_back(encoder: Encoder, tmp_path: Path) -> None:
    task = task_of("1", "2", "3")
    first = run(encoder, task, Scripted(encoder, right), samples=2, out=tmp_path, shape=SHAPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start-sums-think.json", "start-sums-think.parquet"]
    frame = pd.read_parquet(tmp_path / "start-sums-think.parquet")
    assert len(frame) == 6
    assert frame["prompt"].tolist()[:3] == ["question 0", "question 0", "question 1"]
    assert frame["sample"].tolist() == [0, 1, 0, 1, 0, 1]
    assert frame["correct"].all()
    assert set(frame["thinking"]) == {"1+1=2"} and frame["answer"].tolist() == list("112233")
    assert encoder.decode(frame["response_ids"][0].tolist()) == frame["response"][0] == right(_request(task, encoder))
    silent = Scripted(encoder, right, num_calls=0)
    assert run(encoder, task, silent, samples=2, out=tmp_path, shape=SHAPE) == first
    document = json.loads((tmp_path / "start-sums-think.json").read_text())
    assert document["metrics"][0]["mean"] == 1.0


def _request(task: Task, encoder: Encoder) -> Request:
    return encoder.request(task.prompts[0], mode="think", sampling=SAMPLING, seed=0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"samples": 2}, {"weights": "abc"}, {"sampling": dataclasses.replace(SAMPLING, temperature=0.7)}],
)
def test_other_settings_are_examined_anew(encoder: Encoder, tmp_path: Path, change: dict[str, object]) -> None:
    task = task_of("1", "2")
    run(encoder, task, Scripted(encoder, right), out=tmp_path)
    again = Scripted(encoder, lambda request: "0<|im_end|>")
    assert run(encoder, task, again, out=tmp_path, **change).metrics[f"avg@{change.get('samples', 1)}"].mean == 0.0
    assert again.calls == 1


def test_a_changed_question_or_a_broken_file_is_examined_anew(encoder: Encoder, tmp_path: Path) -> None:
    run(encoder, task_of("1", "2"), Scripted(encoder, right), out=tmp_path)
    assert len(run(encoder, task_of("1", "3"), Scripted(encoder, right), out=tmp_path).scores) == 2
    (tmp_path / "start-sums-think.json").write_text("{}")
    again = Scripted(encoder, right)
    run(encoder, task_of("1", "3"), again, out=tmp_path)
    assert again.calls == 1


def test_a_stopped_examination_goes_on_where_it_was(encoder: Encoder, tmp_path: Path) -> None:
    def script(request: Request) -> str:
        return right(request) if request.seed % 3 else "0<|im_end|>"

    task = task_of(*"123456789")
    whole = run(encoder, task, Scripted(encoder, script), out=tmp_path / "whole", chunk=2)
    with pytest.raises(StoppedError):
        run(encoder, task, Scripted(encoder, script, num_calls=3), out=tmp_path / "cut", chunk=2)
    assert not list((tmp_path / "cut").glob("*.json"))
    rest = Scripted(encoder, script)
    resumed = run(encoder, task, rest, out=tmp_path / "cut", chunk=2)
    assert len(rest.seen) == 3
    assert dataclasses.replace(resumed, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)
    assert sorted(path.suffix for path in (tmp_path / "cut").iterdir()) == [".json", ".parquet"]


def test_a_broken_sample_is_wrong_and_counted(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grade = sample_module.grade

    def breaks_on_two(task: str, response: str, answer: str) -> bool:
        if answer == "2":
            raise RecursionError("too deep")
        return grade(task, response, answer)

    monkeypatch.setattr(sample_module, "grade", breaks_on_two)
    result = run(encoder, task_of("1", "2", "3"), Scripted(encoder, right), out=tmp_path)
    assert result.num_broken == 1
    assert list(result.scores.values()) == [(1.0,), (0.0,), (1.0,)]
    frame = pd.read_parquet(tmp_path / "start-sums-think.parquet")
    assert frame["broken"].tolist() == [False, True, False]
    assert "RecursionError" in frame["response"][1]


def test_bytes_that_are_no_text_are_kept_and_graded_wrong(encoder: Encoder, tmp_path: Path) -> None:
    class Noise(Scripted):
        def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
            return [
                dataclasses.replace(rollout, response_ids=tuple(range(150, 150 + len(rollout.response_ids))))
                for rollout in super().generate(requests, on_finished)
            ]

    result = run(encoder, task_of("1", "2"), Noise(encoder, right), out=tmp_path)
    assert result.metrics["avg@1"].mean == 0.0
    assert len(pd.read_parquet(tmp_path / "start-sums-think.parquet")) == 2


def test_a_thinking_budget_and_odd_names_make_their_own_files(encoder: Encoder, tmp_path: Path) -> None:
    budget = dataclasses.replace(SAMPLING, thinking_budget=8)
    run(encoder, task_of("1"), Scripted(encoder, right), out=tmp_path, checkpoint="runs/my model", sampling=budget)
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "runs_my_model-sums-think-budget8.json"


def test_a_soft_switch_makes_its_own_file_and_what_it_writes_is_response(encoder: Encoder, tmp_path: Path) -> None:
    sampler = Scripted(encoder, right)
    run(encoder, task_of("1"), sampler, out=tmp_path, switch="soft")
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "start-sums-think-soft.json"
    assert "/think" in encoder.decode(sampler.seen[0].prompt_ids)


def test_a_question_ends_with_its_modes_instruction_and_keeps_its_id(encoder: Encoder, tmp_path: Path) -> None:
    plain = task_of("1", "2")
    task = dataclasses.replace(plain, instructions={"think": "Step by step."})
    sampler = Scripted(encoder, right)
    found = run(encoder, task, sampler, out=tmp_path)
    assert all("Step by step." in encoder.decode(request.prompt_ids) for request in sampler.seen)
    assert list(found.scores) == [prompt.id for prompt in plain.prompts]
    again = Scripted(encoder, right)
    run(encoder, plain, again, out=tmp_path)
    assert again.calls == 1, "another instruction is another examination"


def test_scores_are_also_given_by_language_and_domain(encoder: Encoder, tmp_path: Path) -> None:
    def script(request: Request) -> str:
        return "0<|im_end|>" if request.prompt.answer == "2" else right(request)

    languages = {"1": "de", "2": "de", "3": "fr", "4": None}
    task = task_of(*languages)
    prompts = tuple(dataclasses.replace(one, language=languages[str(one.answer)]) for one in task.prompts)
    found = run(encoder, dataclasses.replace(task, prompts=prompts), Scripted(encoder, script), out=tmp_path, samples=2)
    assert list(found.slices) == ["language"], "no question has a domain"
    assert {value: result.mean for value, result in found.slices["language"].items()} == {"de": 0.5, "fr": 1.0}
    assert [(entry["slice"], entry["value"], entry["metric"]) for entry in found.slice_entries] == [
        ("language", "de", "avg@2"),
        ("language", "fr", "avg@2"),
    ]
    assert found.slices["language"]["de"].num_questions == 2
    assert Evaluation.from_json(json.loads((tmp_path / "start-sums-think.json").read_text())) == found


def test_leakage_is_thinking_that_nobody_asked_for(encoder: Encoder, tmp_path: Path) -> None:
    def script(request: Request) -> str:
        # Six tokens of thinking, tags included: <think> \\n 1 1 \\n </think>.
        return f"<think>\n11\n</think>\n\n{request.prompt.answer}<|im_end|>" if request.prompt.answer == "1" else "2"

    sampler = Scripted(encoder, script)
    found = evaluate(
        task_of("1", "2", "3", "4"),
        "no_think",
        sampler=sampler,
        encoder=encoder,
        sampling=SAMPLING,
        samples=1,
        seed=0,
        checkpoint="start",
        out=tmp_path,
    )
    assert found.leakage is not None
    assert (found.leakage.share.mean, found.leakage.mean_length) == (0.25, 6 / 4)
    assert Evaluation.from_json(json.loads((tmp_path / "start-sums-no_think.json").read_text())) == found
    assert run(encoder, task_of("1"), Scripted(encoder, right)).leakage is None


def test_open_thinking_is_wrong_and_counted(encoder: Encoder) -> None:
    found = run(encoder, task_of("1", "2"), Scripted(encoder, lambda request: f"<think>\n{request.prompt.answer}"))
    assert (found.num_unclosed, found.metrics["avg@1"].mean) == (2, 0.0)


def test_pass_at_k_is_estimated_from_more_samples_than_k(encoder: Encoder, tmp_path: Path) -> None:
    def script(request: Request) -> str:
        return right(request) if request.seed % 3 == 0 else "0<|im_end|>"

    task = task_of(*"123456")
    found = run(encoder, task, Scripted(encoder, script), samples=8, pass_at=(1, 4), out=tmp_path)
    assert list(found.metrics) == ["avg@8", "pass@1", "pass@4"]
    assert found.metrics["pass@1"].mean == pytest.approx(found.metrics["avg@8"].mean)
    assert found.metrics["pass@4"].mean < found.metrics["pass@1"].mean * 4
    # Another k needs no new responses, and the file says what was asked for last.
    again = run(encoder, task, Scripted(encoder, script, num_calls=0), samples=8, pass_at=(2,), out=tmp_path)
    assert list(again.metrics) == ["avg@8", "pass@2"]
    assert [entry["metric"] for entry in json.loads((tmp_path / "start-sums-think.json").read_text())["metrics"]] == [
        "avg@8",
        "pass@2",
    ]
    with pytest.raises(UserError, match="pass@9 needs at least 9"):
        run(encoder, task, Scripted(encoder, script, num_calls=0), samples=8, pass_at=(9,))


class Fragile(Scripted):
    """Fails on every batch that holds a question from ``poison``."""

    def __init__(self, encoder: Encoder, poison: set[str], error: Exception) -> None:
        super().__init__(encoder, right)
        self.poison, self.error = poison, error

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if any(request.prompt.answer in self.poison for request in requests):
            raise self.error
        return super().generate(requests, on_finished)


def test_a_request_that_breaks_the_sampler_costs_the_others_nothing(encoder: Encoder, tmp_path: Path) -> None:
    task = task_of(*map(str, range(40)))
    sampler = Fragile(encoder, {"5", "33"}, DistillError("the server failed 5 times on the same request"))
    found = run(encoder, task, sampler, out=tmp_path, chunk=16)
    assert found.num_broken == 2
    assert [number for number, row in enumerate(found.scores.values()) if row == (0.0,)] == [5, 33]
    frame = pd.read_parquet(tmp_path / "start-sums-think.parquet")
    assert frame["response"][5] == "[the server failed 5 times on the same request]"
    assert frame["broken"].sum() == 2


def test_a_sampler_that_fails_on_everything_ends_the_examination_soon(encoder: Encoder) -> None:
    everything = set(map(str, range(200)))
    for error in (DistillError("logits are not finite"), StoppedError("stopped", exit_code=75), UserError("no key")):
        sampler = Fragile(encoder, everything, error)
        with pytest.raises(type(error)):
            run(encoder, task_of(*map(str, range(200))), sampler)
        with pytest.raises(type(error)):
            run(encoder, task_of("1"), sampler)


def test_one_who_is_gone_for_good_ends_the_examination_though_others_were_answered(encoder: Encoder) -> None:
    """What was not answered is not wrong: there is no score."""
    sampler = Fragile(encoder, {"7"}, GoneError("the server ended"))
    with pytest.raises(GoneError):
        run(encoder, task_of(*map(str, range(10))), sampler)
    assert len(sampler.seen) == 0


def test_a_question_without_room_is_broken_and_another_is_cut_to_what_is_left(encoder: Encoder) -> None:
    long, short = (Prompt(messages=({"role": "user", "content": "1" * length},), answer="1") for length in (200, 10))
    sampler = Scripted(encoder, right)
    found = run(encoder, Task("sums", (long, short), "number"), sampler, context=60)
    assert found.num_broken == 1 and list(found.scores.values()) == [(0.0,), (1.0,)]
    (request,) = sampler.seen
    assert request.sampling.max_new_tokens == min(SAMPLING.max_new_tokens, 60 - len(request.prompt_ids)) < 60


def test_the_real_sampler_gives_the_same_samples_in_any_batch(encoder: Encoder) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from distill.sampler import TransformersSampler

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    model = Qwen3ForCausalLM(config)
    task = load_task("embedded", num_questions=6)

    def examine(batch: int, chunk: int) -> Evaluation:
        sampler = TransformersSampler(model, encoder, speaker="start", batch=batch)
        return evaluate(
            task,
            "no_think",
            sampler=sampler,
            encoder=encoder,
            sampling=Sampling(max_new_tokens=6, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
            samples=2,
            seed=3,
            checkpoint="start",
            chunk=chunk,
        )

    one, other = examine(batch=12, chunk=256), examine(batch=5, chunk=7)
    assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
    assert one.num_tokens > 12


def test_the_embedded_teacher_scores_higher_when_it_thinks(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.embedded import checkpoint_dir
    from distill.sampler import TransformersSampler

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir("tiny"), dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(checkpoint_dir("tiny")))
    task = load_task("embedded", num_questions=64)
    found = {
        mode: evaluate(
            task,
            mode,
            sampler=TransformersSampler(model, encoder, speaker="teacher"),
            encoder=encoder,
            sampling=dataclasses.replace(SAMPLING, max_new_tokens=96),
            samples=1,
            seed=0,
            checkpoint="teacher",
            out=tmp_path,
        )
        for mode in MODES
    }
    think, no_think = found["think"], found["no_think"]
    assert think.metrics["avg@1"].ci95[0] > no_think.metrics["avg@1"].ci95[1]
    assert think.metrics["avg@1"].mean > 0.9
    assert (think.closure, think.nonempty_thinking, think.truncation) == (1.0, 1.0, 0.0)
    assert no_think.nonempty_thinking == 0.0
    assert think.mean_thinking_length > 5 > no_think.mean_length
