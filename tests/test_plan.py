"""``distill plan``: figures by hand, layouts that fit, the rules, what it prints, and what a run then measures."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill import cli
from distill.config import RunConfig
from distill.errors import UserError
from distill.family import SIZES, Shape, shape_of
from distill.hardware import Pool, calibration_file, load_devices, parse_pool
from distill.memory import RESERVED_BYTES, Load, layer_bytes, student_memory
from distill.roofline import Times
from distill.server_memory import GRAPH_BYTES, USABLE, server_memory, weight_bytes
from distill.vllm.cuts import check_cut
from pipelines.calibration import solve
from pipelines.fitting import changed, search
from pipelines.layouts import Devices, Layout, Pair, StudentLayout, TeacherLayout
from pipelines.pace import ALL_REDUCE_SECONDS, STEP_BYTES, TILE_PASSES, job_times, trained_parameters, wire_bytes
from pipelines.placement import Part, Placement, placement
from pipelines.plan import Plan, estimate, make_plan
from pipelines.plan_document import commands, document, phase_memory
from pipelines.plan_lines import lines
from pipelines.plan_notes import notes
from pipelines.planning import planned
from pipelines.resolution import recipe_names, resolve_run
from pipelines.workload import Job, Lengths, Sequences, workload

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the user's own, empty: the shipped table holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def plan_for(teacher: str, student: str, gpus: str | None = None, *assignments: str, **more: Any) -> Plan:
    config = resolve_run(teacher=teacher, student=student, assignments=assignments)
    return planned(config, gpus=gpus, **more)


def devices(text: str) -> Devices:
    pool = parse_pool(text, load_devices())
    return Devices(pool, pool, is_one=True)


def pair_of(teacher: str, student: str) -> Pair:
    shapes = shape_of(teacher), shape_of(student)
    assert shapes[0] is not None and shapes[1] is not None
    return Pair(shapes[0], shapes[1])


PUBLISHED_PARAMETERS = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}
"""Elements of all tensors of the published checkpoints, tied heads counted once."""


@pytest.mark.parametrize("model", PUBLISHED_PARAMETERS)
def test_a_plan_counts_every_model_s_parameters_exactly(model: str) -> None:
    found = document(plan_for(model, "0.6B", "4x8xB200"))
    assert found["teacher"]["parameters"] == PUBLISHED_PARAMETERS[model]
    assert found["student"]["parameters"] == PUBLISHED_PARAMETERS["0.6B"]
    assert set(PUBLISHED_PARAMETERS) == set(SIZES)


# What a run is asked for.


def test_the_work_of_the_embedded_run_is_what_a_run_counts() -> None:
    """Tokens that ``costs.json`` of `distill run` (seed 0) holds, stage by stage."""
    counted = {
        ("off_policy", "teacher_generate"): 16_510,
        ("off_policy", "student_train"): 73_952,
        ("on_policy", "student_sample"): 245_122,
        ("on_policy", "teacher_score"): 552_260,
        ("on_policy", "student_train"): 552_260,
        ("teacher", "evaluate"): 16_534,
        ("on_policy", "evaluate"): 16_528,
    }
    jobs = {(job.stage, job.role): job for job in workload(resolve_run()).jobs}
    assert {key: jobs[key].tokens for key in counted} == pytest.approx(counted, rel=0.06)
    pair = pair_of("tiny", "nano")
    assert jobs["on_policy", "teacher_score"].flops(pair.teacher, 3) == pytest.approx(1_202_807_557_120, rel=0.06)
    assert jobs["on_policy", "student_train"].flops(pair.student, 3) == pytest.approx(1_780_459_737_600, rel=0.06)


def test_lengths_are_cut_at_their_limits() -> None:
    lengths = Lengths(prompt=100, think=4000, no_think=700)
    said = lengths.of("think", 128, 4096)
    assert said.response == pytest.approx(4000 * (1 - math.exp(-1.024)))
    assert said.longest_of(64) == 4096
    short = lengths.of("no_think", 128, 4096)
    assert short.longest_of(64) == pytest.approx(700 * (math.log(64) + 0.5772))
    assert short.longest_of(1) == short.response  # the mean of one is its length
    endless = Lengths(think=1e300).of("think", 8, 4096)
    assert endless.response == pytest.approx(4096) and endless.longest_of(8) == 4096


def test_examinations_and_curves_are_counted() -> None:
    config = resolve_run(
        teacher="4B",
        student="0.6B",
        assignments=[
            "evaluation.tasks=[gsm8k, aime24, mode_switching, {path: my.jsonl}]",
            "evaluation.num_questions=null",
            "evaluation.budgets=[1000]",
            "evaluation.curve={every: 50, num_questions: 100, samples: 2}",
            "stages.off_policy=null",
        ],
    )
    work = workload(config)
    (final,) = [job for job in work.jobs if job.stage == "teacher"]
    # gsm8k and aime24 (64 samples) in two modes and with a budget, 512 turns of switching, an unknown file of 512.
    expected = 3 * 1319 + 3 * 30 * 64 + 512 + 3 * 512
    assert sum(part.num for part in final.sequences) == expected
    assert any("my.jsonl is taken to have 512" in note for note in work.notes)
    (curve,) = [job for job in work.jobs if job.stage == "on_policy" and job.role == "evaluate" and job.times > 1]
    assert (curve.times, sum(part.num for part in curve.sequences)) == (4, 200)  # before, and after 50, 100, 150


def test_reinforcement_learning_scores_with_no_teacher() -> None:
    jobs = workload(resolve_run(recipe="embedded-grpo")).jobs
    grpo = {job.role for job in jobs if job.kind != "decode" or job.role == "student_sample"}
    assert "teacher_score" not in grpo
    again = workload(
        resolve_run(recipe="embedded-grpo", assignments=["stages.grpo.policy_gradient.updates_per_step=2"])
    ).jobs
    assert [job.who for job in again if job.role == "student_score"] == ["student"]
    # Two updates are two optimiser steps on half the responses each.
    (one,), (two,) = (
        [job for job in found if (job.stage, job.role) == ("grpo", "student_train")] for found in (jobs, again)
    )
    assert two.times == 2 * one.times and two.sequence_tokens == one.sequence_tokens / 2
    assert two.tokens == pytest.approx(one.tokens)


def test_a_sampler_that_is_for_one_process_is_planned_with_one() -> None:
    shared = plan_for("4B", "0.6B", "8xH100", "sampler.backend=vllm")
    assert any("sampler.backend=vllm: on the trainer's device, in turns with it" in one for one in notes(shared))
    assert not any("sampler.backend" in note for note in notes(plan_for("4B", "0.6B", "8xH100")))
    for setting in ("staleness=1", "sleep=true", "place=in_process"):
        settings = ("sampler.backend=vllm", f"sampler.{setting}")
        found = plan_for("4B", "0.6B", "8xH100", *settings)
        every = [found.best, *(one for _, one in found.others)]
        assert {one.layout.student.processes for one in every} == {1}
        with pytest.raises(
            UserError, match=rf"sampler\.{setting} is for one process, and there are 2; set it to its d"
        ):
            plan_for("4B", "0.6B", "8xH100", *settings, processes=2)


# Memory.


def test_a_server_s_memory_by_hand() -> None:
    shape = SIZES["235B-A22B"]
    head = 151_936 * 4096
    assert weight_bytes(shape, 1) == shape.total_parameters + 2 * head  # embedding and head stay in 16 bits
    found = server_memory(
        shape, "score", tensor_parallel=4, pipeline_parallel=1, item=2, gpu_bytes=141 * 10**9, tokens_under_way=65536
    )
    assert found.parts["weights"] == 2 * 235_093_634_560 // 4
    assert found.parts["hidden states"] == 65536 * 8192
    assert found.token_bytes == 192_512 // 4  # the published cache of a token, over four heads
    assert found.room == int(USABLE * 141e9) - sum(found.parts.values())
    assert found.fits(found.cache_tokens) and not found.fits(found.cache_tokens + 1)
    # Eight GPUs share four heads: each head is there twice.
    eight = server_memory(
        shape, "generate", tensor_parallel=8, pipeline_parallel=2, item=1, gpu_bytes=80 * 10**9, tokens_under_way=1
    )
    assert eight.token_bytes == 192_512 // 4 // 2
    assert eight.parts["weights"] == (shape.total_parameters + 2 * head) // 16
    assert eight.parts["graphs"] == GRAPH_BYTES and "hidden states" in eight.parts


def test_every_layout_fits_and_no_smaller_micro_batch_was_taken_than_needed() -> None:
    config, pair = resolve_run(teacher="32B", student="8B"), pair_of("32B", "8B")
    found = search(config, pair, devices("8xH100")).layouts
    assert found
    for layout in found:
        memory = student_memory(
            layout.config,
            pair.student,
            pair.teacher,
            processes=layout.student.processes,
            engine=layout.student.engine,
        )
        room = 80 * 10**9 - RESERVED_BYTES
        assert memory == layout.student.memory and memory.total <= room
        assert layout.gpus <= 8
        tokens = layout.config.student.micro_batch_tokens
        assert tokens is not None
        if tokens < 32768:
            student = layout.config.student.model_copy(update={"micro_batch_tokens": 2 * tokens})
            larger = layout.config.model_copy(update={"student": student})
            more = student_memory(
                larger, pair.student, pair.teacher, processes=layout.student.processes, engine=layout.student.engine
            )
            assert more.stays + more.training > room


def test_what_is_left_to_the_driver_is_left(home: Path) -> None:
    # Activations are kept: training needs more than sampling.
    config = resolve_run(teacher="4B", student="0.6B", assignments=["student.gradient_checkpointing=false"])
    pair = pair_of("4B", "0.6B")
    needed = student_memory(config, pair.student, pair.teacher).total + RESERVED_BYTES

    def tokens(num_bytes: int) -> list[int | None]:
        table = home / "exact.yaml"
        figures = load_devices()["H100"].model_dump(mode="json", exclude_none=True)
        table.write_text(json.dumps({"EXACT": {**figures, "memory": num_bytes / 1e9}}))
        pool = parse_pool("EXACT", load_devices(table))
        layouts = search(config, pair, Devices(pool, pool, is_one=True)).layouts
        return [layout.config.student.micro_batch_tokens for layout in layouts]

    assert tokens(needed + 1000) == [32768]
    assert tokens(needed - 1000) == [16384]


# Rules.


def test_the_235b_in_fp8_on_eight_gpus_keeps_its_experts_whole() -> None:
    config = resolve_run(teacher="Qwen/Qwen3-235B-A22B-FP8", student="4B")
    layouts = search(config, pair_of("235B", "4B"), devices("2x8xH100")).layouts
    assert {layout.teacher.expert_parallel for layout in layouts if layout.teacher.tensor_parallel == 8} == {True}
    assert {layout.teacher.expert_parallel for layout in layouts if layout.teacher.tensor_parallel == 4} == {False}
    found = plan_for("Qwen/Qwen3-235B-A22B-FP8", "0.6B", None, gpus_teacher="8xA100-80", gpus_student="1xA100-80")
    if found.best.layout.teacher.tensor_parallel == 8:
        assert any("--enable-expert-parallel" in note for note in notes(found))


def test_a_tied_student_in_slices_gathers_embedding_and_head_as_one() -> None:
    tied, untied = plan_for("32B", "4B", "2x8xL40S"), plan_for("32B", "8B", "2x8xH100")
    for found, heads in ((tied, 1), (untied, 2)):
        layout, shape = found.best.layout, found.pair.student
        assert layout.student.engine == "sharded"
        head = shape.vocabulary * shape.width
        layer = (shape.total_parameters - heads * head) // shape.num_layers
        assert layout.student.memory.parts["gathered"] == 8 * heads * head + 10 * layer
    assert any("one FSDP group" in note for note in notes(tied))
    assert not any("one FSDP group" in note for note in notes(untied))


def test_vocabulary_rows_are_cut_evenly() -> None:
    layouts = search(resolve_run(teacher="32B", student="8B"), pair_of("32B", "8B"), devices("2x8xH100")).layouts
    counts = {layout.student.processes for layout in layouts if layout.student.engine == "sharded"}
    assert counts and all(151_936 % count == 0 for count in counts)
    assert all(151_936 % layout.teacher.tensor_parallel == 0 for layout in layouts)


@pytest.mark.parametrize(
    ("change", "size", "said"),
    [
        ({"num_heads": 12}, 8, "attention heads, which 8 GPUs cannot share evenly; take 6"),
        ({"num_heads": 30, "num_kv_heads": 10, "vocabulary": 30 * 64}, 15, "heads of keys and values"),
        ({"num_heads": 15, "num_kv_heads": 5, "vocabulary": 151_936}, 5, "vocabulary rows, which 5 GPUs"),
    ],
)
def test_a_cut_that_vllm_would_refuse_is_refused(change: dict[str, int], size: int, said: str) -> None:
    shape = Shape(**{**{name: getattr(SIZES["4B"], name) for name in SIZES["4B"].__slots__}, **change})
    with pytest.raises(UserError, match=said):
        check_cut("a model", shape, {}, tensor_parallel=size, pipeline_parallel=1)


def test_a_pair_of_two_vocabularies_has_no_plan() -> None:
    with pytest.raises(UserError, match="151,936 vocabulary rows and the student nano"):
        plan_for("4B", "nano")


# Time.


def alone(config: RunConfig, pair: Pair, text: str = "1xH100") -> Layout:
    pool = parse_pool(text, load_devices())
    held = student_memory(config, pair.student, pair.teacher)
    return Layout(config, TeacherLayout("local", 2), StudentLayout(1, "alone", held), pool, pool, (), ())


def job(kind: Any, who: Any, *, judged: bool = False) -> Job:
    return Job("a test", kind, kind, who, 1, (Sequences(32, 100, 900, 900, 1000, 1000),), judged=judged)


def test_a_training_step_by_hand() -> None:
    config = resolve_run(teacher="8B", student="4B", assignments=["student.micro_batch_tokens=32000"])
    pair = pair_of("8B", "4B")
    student, teacher, device = pair.student, pair.teacher, load_devices()["H100"]
    found = job_times(job("train", "student", judged=True), pair, alone(config, pair))
    tokens, responses, head = 32 * 1000, 32 * 900, 151_936 * 2560
    body = student.total_parameters - head
    norms = 36 * (2 * 2560 + 2 * 128) + 2560
    attention = 4 * 36 * 32 * 128 * (100 * 50 + 900 * 550) * 32
    # A pass of the body four times (checkpointing repeats one), the head three times at the response's rows, and the
    # teacher's head once.
    flops = 4 * (2 * (body - norms) * tokens + attention) + 6 * head * responses + 2 * responses * 151_936 * 4096
    assert found.compute == pytest.approx(flops / (989e12 * device.shares.train))
    assert found.wire == 0 and found.latency == pytest.approx(36 * device.latency.train * 1e-6)
    assert found.memory > (3 * 2 + STEP_BYTES) * student.total_parameters / (3350e9 * 0.7)
    assert found.memory > responses * TILE_PASSES * 4 * 151_936 / (3350e9 * 0.7)
    assert teacher.vocabulary == student.vocabulary


def test_rescoring_by_hand() -> None:
    """The student over what it said: its own micro-batches and numbers, and its head at the rows of the response."""
    sets = ["student.micro_batch_tokens=16000", "teacher.batch_tokens=1000", "teacher.dtype=float32"]
    config, pair = resolve_run(teacher="8B", student="4B", assignments=sets), pair_of("8B", "4B")
    shape, device = pair.student, load_devices()["H100"]
    found = job_times(job("score", "student"), pair, alone(config, pair))
    head, norms = 151_936 * 2560, 36 * (2 * 2560 + 2 * 128) + 2560
    attention = 4 * 36 * 32 * 128 * (100 * 50 + 900 * 550) * 32
    flops = 2 * (shape.total_parameters - head - norms) * 32_000 + attention + 2 * 32 * 900 * head
    assert found.compute == pytest.approx(flops / (989e12 * device.shares.score))
    assert found.latency == pytest.approx(2 * 36 * device.latency.score * 1e-6)
    # The teacher in the same process: its own batches, and no head.
    other = job_times(job("score", "teacher"), pair, alone(config, pair))
    assert other.latency == pytest.approx(32 * 36 * device.latency.score * 1e-6)


def test_memory_of_rescoring_is_the_student_s() -> None:
    assignments = ["stages.grpo.policy_gradient.updates_per_step=2"]
    found = planned(resolve_run(recipe="embedded-grpo", assignments=assignments))
    (phase,) = [phase for phase in found.best.phases if phase.job.role == "student_score"]
    config, stages = found.best.layout.config, found.best.layout.config.stages
    load = Load.of(config.model_copy(update={"stages": {phase.job.stage: stages[phase.job.stage]}}), 1)
    parts = phase_memory(phase, found)
    assert parts["activations"] == load.micro_batch_tokens * layer_bytes(found.pair.student, 4)
    assert "states" not in parts and parts["tiles"] > 0


def test_offload_is_taken_only_where_nothing_fits_without() -> None:
    for teacher, student, gpus in (("32B", "8B", "2x8xH100"), ("32B", "4B", "2x8xL40S"), ("8B", "32B", "4xH100")):
        found = search(resolve_run(teacher=teacher, student=student), pair_of(teacher, student), devices(gpus)).layouts
        assert len({one.config.student.cpu_offload for one in found}) <= 1


def test_what_is_offloaded_is_in_the_machines_memory() -> None:
    """Masters, gradients and both moments, four bytes each a parameter."""
    plan = plan_for("32B", "32B", "8xH100")
    assert plan.best.layout.config.student.cpu_offload
    (said,) = (note for note in notes(plan) if note.startswith("offload"))
    assert f"have to hold {16 * SIZES['32B'].total_parameters / 1e9:.0f} GB" in said


def test_that_somebody_else_s_servers_are_planned_for_is_said() -> None:
    """A plan counts and pays their GPUs too, and proposes to start such servers."""
    urls = [f"teacher.urls.{role}=[http://a:1]" for role in ("score", "generate")]
    own = plan_for("32B", "4B", "8xH100", "teacher.backend=vllm")
    said = "servers that teacher.urls names are planned, paid for and started"
    assert not any(note.startswith(said) for note in notes(own))
    assert any(note.startswith(said) for note in notes(plan_for("32B", "4B", "8xH100", "teacher.backend=vllm", *urls)))
    with pytest.raises(UserError, match="names are planned for too: their GPUs are named apart"):
        plan_for("235B", "4B", "4xH100", "teacher.backend=vllm", *urls)


def test_caches_are_not_made_smaller_than_the_longest_sequence() -> None:
    sets = ["evaluation.sampling.think.max_new_tokens=400000", "sampler_tokens=500000", "teacher.backend=local"]
    config, pair = resolve_run(teacher="4B", student="0.6B", assignments=sets), pair_of("4B", "0.6B")
    longest = config.max_prompt_tokens + config.longest_response
    needed = student_memory(config.model_copy(update={"sampler_tokens": longest}), pair.student, pair.teacher)
    device = load_devices()["H100"].model_copy(update={"memory": (needed.total + RESERVED_BYTES + 1000) / 1e9})
    pool = Pool("EXACT", device, 1, 8)
    (layout,) = search(config, pair, Devices(pool, pool, is_one=True)).layouts
    assert layout.config.sampler_tokens == longest


def test_decoding_reads_weights_and_cache_once_a_step() -> None:
    config, pair = resolve_run(teacher="8B", student="4B"), pair_of("8B", "4B")
    found = job_times(job("decode", "student"), pair, alone(config, pair))
    # 131,072 tokens of cache hold 119 rows of 1,100 tokens: all 32 at once, 1,000 steps to the longest's end.
    weights = 1000 * 2 * 4_022_468_096
    cache = 147_456 * 32 * 900 * (100 + 450)
    logits = 32 * 900 * 8 * 4 * 151_936
    assert found.memory == pytest.approx((weights + cache + logits) / (3350e9 * 0.7))
    assert found.latency == pytest.approx(1000 * 36 * load_devices()["H100"].latency.sample * 1e-6)
    # With room for eight, each that ends makes room for another: 32 * 900 tokens in 3,600 steps.
    few = config.model_copy(update={"sampler_tokens": 8 * 1100})
    assert job_times(job("decode", "student"), pair, alone(few, pair)).latency == pytest.approx(3.6 * found.latency)


def test_a_mixture_reads_the_experts_that_were_chosen() -> None:
    config, pair = resolve_run(teacher="30B", student="0.6B"), pair_of("30B", "0.6B")
    one = Job("a test", "evaluate", "decode", "teacher", 1, (Sequences(1, 1, 1000, 1000, 1000, 1000),))
    found = job_times(one, pair, alone(config, pair))
    shape = pair.teacher
    experts = 48 * 128 * 3 * 2048 * 768
    read = shape.total_parameters - 151_936 * 2048 - experts * (1 - 8 / 128)
    logits, cache = 1000 * 8 * 4 * 151_936, 98_304 * 1000 * 501
    assert found.memory == pytest.approx((1000 * 2 * read + logits + cache) / (3350e9 * 0.7))


def test_the_wire_of_each_engine_by_hand() -> None:
    pair, num = pair_of("32B", "4B"), SIZES["4B"].total_parameters
    config = resolve_run(teacher="32B", student="4B", assignments=["student.micro_batch_tokens=2048"])
    layouts = search(config, pair, devices("2x8xH200")).layouts
    assert {layout.student.engine for layout in layouts} == {"alone", "replicated", "sharded"}
    for layout in layouts:
        count = layout.student.processes
        if count == 1 or layout.config.student.cpu_offload:
            continue
        rate = (450e9 if count <= 8 else 50e9) * 0.7
        passes = math.ceil(32 * 1000 / count / (layout.config.student.micro_batch_tokens or 0))
        # A micro-batch: bf16 weights of the layers twice, fp32 gradients of all. A step: the head, which is tied.
        head = 151_936 * 2560
        sharded = passes * (4 * (num - head) + 4 * num) + 2 * head
        bytes_moved = {"replicated": 8 * num, "sharded": sharded}[layout.student.engine] * (count - 1) / count
        assert job_times(job("train", "student"), pair, layout).wire == pytest.approx(bytes_moved / rate)


def served(tensor_parallel: int, replicas: int = 1, processes: int = 4) -> tuple[Pair, Layout]:
    """The 235B on H200 behind servers, beside a 4B student."""
    pair, config = pair_of("235B", "4B"), resolve_run(teacher="235B", student="4B")
    (layout,) = [
        layout
        for layout in search(config, pair, devices("2x8xH200")).layouts
        if (layout.teacher.tensor_parallel, layout.teacher.replicas) == (tensor_parallel, replicas)
        and (layout.student.processes, layout.student.engine) == (processes, "replicated")
    ]
    return pair, layout


def test_scoring_in_servers_by_hand() -> None:
    pair, layout = served(4)
    shape, device = pair.teacher, load_devices()["H200"]
    tokens, passes = 32 * 1000, 4  # of 8,192 tokens
    found = job_times(job("score", "teacher"), pair, layout)
    attention = 4 * 94 * 64 * 128 * (100 * 50 + 900 * 550) * 32
    flops = 2 * (shape.active_parameters - 151_936 * 4096) * tokens + attention
    assert found.compute == pytest.approx(flops / 4 / (989e12 * device.shares.score * 0.5))
    all_reduced = 2 * 94 * tokens * 4096 * 2 * 2 * 3 / 4 / (450e9 * 0.7)
    # 8,192 bytes a token to four processes that each take a gigabyte a second.
    assert found.wire == pytest.approx(all_reduced + tokens * 8192 / 4e9)
    assert found.latency == pytest.approx(passes * 94 * device.latency.serve * 1e-6)
    pair, twice = served(4, replicas=2)
    assert job_times(job("score", "teacher"), pair, twice).compute == pytest.approx(found.compute / 2)


def test_speaking_in_servers_by_hand() -> None:
    pair, layout = served(4)
    shape, device = pair.teacher, load_devices()["H200"]
    found = job_times(job("decode", "teacher"), pair, layout)
    # All 32 at once: 1,000 steps to the longest's end, 28.8 rows a step on the mean.
    experts = 94 * 128 * 3 * 4096 * 1536
    read = shape.total_parameters - 151_936 * 4096 - experts * (1 - 8 / 128) ** 28.8
    cache = 192_512 * 32 * 900 * (100 + 450) / 4
    logits = 32 * 900 * 8 * 4 * 151_936 / 4
    assert found.memory == pytest.approx((1000 * 2 * read / 4 + cache + logits) / (4800e9 * 0.7))
    assert found.latency == pytest.approx(1000 * 94 * (device.latency.serve * 1e-6 + 2 * ALL_REDUCE_SECONDS))
    # More responses than the cache holds wait for their turn.
    crowd = Job("a test", "evaluate", "decode", "teacher", 1, (Sequences(2000, 100, 900, 900, 1000, 1000),))
    slots = min(256, layout.teacher.servers["generate"].cache_tokens // 1000)
    steps = 2000 * 900 / slots
    assert job_times(crowd, pair, layout).latency == pytest.approx(found.latency * steps / 1000)


def test_bytes_of_a_judgement() -> None:
    config = resolve_run(teacher="235B", student="4B")
    shape = SIZES["235B-A22B"]

    def of(*assignments: str) -> float:
        return wire_bytes(
            shape, resolve_run(teacher="235B", student="4B", assignments=assignments).teacher, local=False
        )

    assert wire_bytes(shape, config.teacher, local=True) == 0
    assert (of(), of("teacher.wire=fp8"), of("teacher.wire=fp32")) == (8192, 4096, 16384)
    # docs/teacher-signals.md: 1,450 bytes at k = 20 and 8,925 at k = 128.
    measured = of("teacher.signal=topk"), of("teacher.signal=topk", "teacher.top_k=128")
    assert measured == pytest.approx((1450, 8925), rel=0.05)


def test_scoring_behind_servers_is_hidden_by_the_longer_sampling() -> None:
    found = plan_for("235B", "4B", "8xH200").best
    by_role = {phase.job.role: phase for phase in found.phases if phase.job.stage == "on_policy"}
    sample, score, train = (by_role[role] for role in ("student_sample", "teacher_score", "student_train"))
    assert score.is_hidden and sample.seconds > score.seconds and not sample.is_hidden and not train.is_hidden
    hidden = sum(phase.seconds for phase in found.phases if phase.is_hidden)
    assert found.seconds == pytest.approx(sum(phase.seconds for phase in found.phases) - hidden)
    assert found.gpu_hours == pytest.approx(found.layout.gpus * found.seconds / 3600)
    assert not any(phase.is_hidden for phase in plan_for("tiny", "nano").best.phases)


def test_prefill_of_the_235b_in_fp8_is_of_the_published_size() -> None:
    """31,000 to 42,000 tokens a second of vLLM on eight H100, reading and writing together; reading alone is faster."""
    pair = pair_of("235B", "0.6B")
    config = resolve_run(teacher="Qwen/Qwen3-235B-A22B-FP8", student="0.6B")
    (layout,) = [
        layout
        for layout in search(config, pair, devices("2x8xH100")).layouts
        if (layout.teacher.tensor_parallel, layout.teacher.replicas, layout.student.processes) == (8, 1, 8)
        and layout.student.engine == "replicated"
    ]
    long = Job("a test", "teacher_score", "score", "teacher", 1, (Sequences(1000, 1000, 1000, 1000, 1000, 1000),))
    assert 31_000 < long.tokens / job_times(long, pair, layout).seconds < 3 * 42_000


# Choice.


def test_the_best_is_the_cheapest_of_what_fits() -> None:
    found = plan_for("32B", "4B", "8xH100", price=2.0)
    assert found.best.usd == pytest.approx(2 * found.best.gpu_hours)
    assert not found.best.layout.changes
    fastest = dict(found.others).get("fastest", found.best)
    assert fastest.seconds <= found.best.seconds and fastest.cost >= found.best.cost
    for name, one in found.others:
        assert bool(one.layout.changes) == (name not in ("fastest", "shared GPUs", "separate GPUs"))


@pytest.mark.parametrize("price", [None, 2.0])
def test_nothing_that_fits_is_cheaper(price: float | None) -> None:
    config, pair = resolve_run(teacher="32B", student="4B"), pair_of("32B", "4B")
    found = plan_for("32B", "4B", "8xH100", price=price)
    work = workload(config)
    every = [estimate(layout, pair, work) for layout in search(config, pair, found.devices).layouts]
    assert found.best.gpu_hours == min(one.gpu_hours for one in every)
    assert dict(found.others)["fastest"].seconds == min(one.seconds for one in every) < found.best.seconds


def test_money_decides_where_prices_differ() -> None:
    """A dear teacher's pool is kept small, whatever that costs in GPU-hours."""
    known = load_devices()
    dear = known["H200"].model_copy(update={"usd_per_hour": 1000.0})
    cheap = known["H200"].model_copy(update={"usd_per_hour": 0.01})
    config, pair = resolve_run(teacher="32B", student="4B"), pair_of("32B", "4B")
    pools = Devices(Pool("H200", dear, 8, 8), Pool("H200", cheap, 8, 8), is_one=False)
    work = workload(config)
    every = [estimate(layout, pair, work) for layout in search(config, pair, pools).layouts]
    best = make_plan(config, pair, known, pools).best
    assert best.usd == min(one.usd or 0 for one in every)
    assert best.gpu_hours > min(one.gpu_hours for one in every)


def test_both_arrangements_of_gpus_are_weighed() -> None:
    found = plan_for("4B", "0.6B", "4xH100")
    shared = [found.best, *(one for _, one in found.others)]
    assert {one.layout.is_shared for one in shared if not one.layout.changes} == {True, False}


def test_two_pools_are_kept_apart_and_paid_apart() -> None:
    found = plan_for("32B", "4B", None, gpus_teacher="4xH200", gpus_student="8xA100-80", price=1.0)
    layout = found.best.layout
    assert (layout.teacher_pool.name, layout.student_pool.name) == ("H200", "A100-80")
    assert layout.teacher.gpus <= 4 and layout.student.processes <= 8 and not layout.is_shared
    assert found.best.usd == pytest.approx(found.best.gpu_hours)


def test_without_devices_the_fewest_usual_ones_that_change_nothing_are_taken() -> None:
    found = plan_for("235B", "8B")
    assert str(found.devices) == "2x8xH100" and not found.best.layout.changes
    assert str(plan_for("tiny", "nano").devices) == "1xCPU"


def test_the_number_of_processes_can_be_fixed() -> None:
    assert plan_for("4B", "0.6B", "8xH100", processes=2).best.layout.student.processes == 2
    assert plan_for("4B", "0.6B", "8xH100", processes=3).best.layout.student.processes == 3
    assert str(plan_for("tiny", "nano", processes=2).devices) == "2xCPU"
    with pytest.raises(UserError, match=r"nothing fits 1xH100 with 2 processes of the student: .*; what would: 2xH100"):
        plan_for("4B", "0.6B", "1xH100", processes=2)


@pytest.mark.parametrize(
    ("teacher", "student", "gpus", "said"),
    [
        ("235B", "4B", "4xL40S", "what would: 4x8xL40S"),
        ("32B", "0.6B", "1xH100", "what would: 4xH100, or 1xH200"),
        ("235B", "14B", "1xRTX4090", "nothing fits 1xRTX4090"),
        ("8B", "8B", "1xL40S", "the student 8B with the teacher 8B beside it needs"),
    ],
)
def test_what_does_not_fit_is_told_what_would(teacher: str, student: str, gpus: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        plan_for(teacher, student, gpus)
    assert said in str(error.value) and "needs" in str(error.value)


def test_where_only_another_result_fits_the_plan_begins_with_that() -> None:
    found = plan_for("8B", "8B", "1xH100")
    assert found.best.layout.changes == ("lora",)
    assert next(iter(lines(found))) == "nothing fits 1xH100 as configured; with --set student.lora.rank=64:"
    assert any("the student 8B with the teacher 8B beside it needs" in shortage for shortage in found.shortages)


def test_what_a_sentence_names_does_fit() -> None:
    with pytest.raises(UserError) as error:
        plan_for("235B", "4B", "4xL40S")
    assert plan_for("235B", "4B", str(error.value).partition("what would: ")[2].split(",")[0].strip())


def test_changes_are_assignments_that_a_run_takes() -> None:
    config = resolve_run(teacher="235B", student="4B")
    for change in ("fp8", "lora", "adamw-8bit"):
        new, assignments = changed(config, (change,))  # type: ignore[arg-type]
        assert new is not None
        assert resolve_run(teacher="235B", student="4B", assignments=assignments).student == new.student
        assert changed(new, (change,))[0] is None  # type: ignore[arg-type]


def test_the_proposed_commands_are_ones_that_a_run_takes() -> None:
    found = plan_for("235B", "4B", "8xH200", "stages.on_policy.steps=10", asked=["--set", "stages.on_policy.steps=10"])
    generate, score, run = commands(found)
    assert generate.startswith(
        "CUDA_VISIBLE_DEVICES=0,1,2,3 distill teacher serve --teacher 235B --tp 4 --role generate"
    )
    assert "--role score --port 8101" in score
    words = shlex.split(run.partition("distill run ")[2])
    assignments = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    config = resolve_run(teacher="235B", student="4B", assignments=assignments)
    assert config.teacher.urls.score == ("http://127.0.0.1:8101",) and config.teacher.backend == "vllm"
    assert "CUDA_VISIBLE_DEVICES=6,7" in run and "--processes 2" in run  # short steps: fewer processes are cheaper


def test_a_plan_that_moves_a_teacher_out_of_its_servers_leaves_none_of_their_cuts() -> None:
    """What it sets is set on top of the recipe, which may not keep cuts of servers that there are none of."""
    recipe = "qwen3-235b-to-0.6b"
    cut = ["teacher.model=4B", "teacher.replicas=2"]
    config = resolve_run(recipe=recipe, assignments=cut)
    assert config.teacher.tensor_parallel > 1
    layouts = search(config, pair_of("4B", "0.6B"), devices("2xH200")).layouts
    backends = set()
    for layout in layouts:
        found = resolve_run(recipe=recipe, assignments=[*cut, *layout.assignments]).teacher
        backends.add(found.backend)
        assert found.backend == layout.teacher.backend
        assert (found.tensor_parallel, found.replicas) == ((1, 1) if layout.is_shared else (8, 2))
    assert backends == {"local", "vllm"}


def test_a_plan_that_moves_a_teacher_out_of_its_servers_leaves_none_of_their_settings() -> None:
    """What a run refuses to pass over the plan takes back; and a teacher in the run's processes is never quantised."""
    set_to = ["teacher.wire=fp32", "teacher.server_args=[--x]", "teacher.urls.score=[http://a:1]"]
    config = resolve_run(teacher="4B", student="0.6B", assignments=set_to)
    backends = set()
    for layout in search(config, pair_of("4B", "0.6B"), devices("2xH200")).layouts:
        found = resolve_run(teacher="4B", student="0.6B", assignments=[*set_to, *layout.assignments])
        found.check_teachers()
        backends.add(found.teacher.backend)
        if layout.is_shared:
            assert found.teacher == resolve_run(teacher="4B", student="0.6B").teacher
    assert backends == {"local", "vllm"}
    for method in ("fp8", "awq"):
        config = resolve_run(teacher="4B", student="0.6B", assignments=[f"teacher.quantization={method}"])
        layouts = search(config, pair_of("4B", "0.6B"), devices("2xH200")).layouts
        assert layouts and not any(layout.is_shared for layout in layouts)


def test_a_run_is_told_how_the_servers_of_its_plan_are_quantised() -> None:
    """Or it would store their responses as those of the teacher that is not."""
    config = resolve_run(teacher="tiny", student="nano")
    (layout, *_) = search(config, pair_of("tiny", "nano"), devices("2xCPU"), ["fp8"]).layouts
    pair = pair_of("tiny", "nano")
    work = workload(config)
    plan = Plan(config, pair, devices("2xCPU"), work, estimate(layout, pair, work), (), ())
    serve, *_, run = commands(plan)
    assert "--quantization fp8" in serve and "--set teacher.quantization=fp8" in run


def words_of(line: str) -> dict[str, str]:
    """A command's options with their values, the machine it is for as ``on``."""
    words = shlex.split(line, comments=True)
    found = {word: value for word, value in itertools.pairwise(words) if word.startswith("--") and word != "--set"}
    return {**found, "on": line.partition("# on ")[2], "gpus": words[0].removeprefix("CUDA_VISIBLE_DEVICES=")}


def test_commands_of_a_student_on_two_machines() -> None:
    spread = plan_for("8B", "8B", None, gpus_teacher="1x4xH200", gpus_student="4x2xH200", processes=8)
    *serve, first, second, third, fourth = commands(spread)
    ranks = [words_of(line) for line in (first, second, third, fourth)]
    assert [one["on"] for one in ranks] == [f"STUDENT_HOST_{place}" for place in range(4)]
    assert [one["--node-rank"] for one in ranks] == ["0", "1", "2", "3"]
    assert {(one["--nodes"], one["--processes"], one["--node-address"]) for one in ranks} == {
        ("4", "2", "STUDENT_HOST_0")
    }
    for line in serve:
        one = words_of(line)
        assert one["on"] == "TEACHER_HOST_0" and one["--host"] == "0.0.0.0" and "--nodes" not in one
    assert "http://TEACHER_HOST_0:8001" in first and "CUDA_VISIBLE_DEVICES" not in first


def test_commands_of_a_server_on_two_machines_and_of_replicas_on_each() -> None:
    spread = plan_for("235B", "0.6B", None, gpus_teacher="2x4xH100", gpus_student="1x8xH100")
    layout = spread.best.layout
    assert (layout.teacher.tensor_parallel * layout.teacher.pipeline_parallel, layout.teacher.replicas) == (8, 1)
    generate = [words_of(line) for line in commands(spread) if "--role generate" in line]
    assert [(one["on"], one["--node-rank"], one["--nodes"], one["--node-address"]) for one in generate] == [
        ("TEACHER_HOST_0", "0", "2", "TEACHER_HOST_0"),
        ("TEACHER_HOST_1", "1", "2", "TEACHER_HOST_0"),
    ]
    assert "teacher.urls.generate=[http://TEACHER_HOST_0:8001]" in commands(spread)[-1]
    held = TeacherLayout("vllm", 2, 2, 1, 3)
    pool = parse_pool("2x4xH100", load_devices())
    memory = layout.student.memory
    found = placement(held, StudentLayout(2, "replicated", memory), (pool, pool), is_one=True)
    assert found is not None
    assert found.student == (Part(1, (2, 3)),)
    assert found.servers == ((Part(0, (0, 1)),), (Part(0, (2, 3)),), (Part(1, (0, 1)),))
    best = replace(
        layout, teacher=held, teacher_pool=pool, student_pool=pool, student=StudentLayout(2, "sharded", memory)
    )
    shared = replace(spread, devices=Devices(pool, pool, is_one=True), best=replace(spread.best, layout=best))
    both, one, *_ = commands(shared)
    assert both.startswith("CUDA_VISIBLE_DEVICES=0,1,2,3 ") and words_of(both)["--replicas"] == "2"
    assert words_of(one)["on"] == "HOST_1" and words_of(one)["gpus"] == "0,1" and "--replicas" not in one
    run = commands(shared)[-1]
    assert "http://HOST_0:8001, http://HOST_0:8002, http://HOST_1:8001" in run and run.startswith(
        "CUDA_VISIBLE_DEVICES=2,3 "
    )


def test_what_no_machines_hold_evenly_is_not_planned() -> None:
    memory = student_memory(resolve_run(), *(pair_of("tiny", "nano").student,) * 2)
    pool = parse_pool("2x8xH100", load_devices())

    def held(size: int, count: int) -> Placement | None:
        teacher, student = TeacherLayout("vllm", 2, size), StudentLayout(count, "sharded", memory)
        return placement(teacher, student, (pool, pool), is_one=True)

    # Six of each machine, which leaves two of each: room for a server on two GPUs, and for none on four.
    assert held(2, 12) == Placement((Part(0, (2, 3, 4, 5, 6, 7)), Part(1, (2, 3, 4, 5, 6, 7))), ((Part(0, (0, 1)),),))
    assert held(4, 12) is None
    assert held(4, 4) == Placement((Part(0, (4, 5, 6, 7)),), ((Part(0, (0, 1, 2, 3)),),))
    layouts = search(resolve_run(teacher="32B", student="8B"), pair_of("32B", "8B"), devices("2x8xH100")).layouts
    assert layouts and not {9, 11, 13, 15} & {one.student.processes for one in layouts}


def test_disk_by_hand() -> None:
    found = plan_for("235B", "4B", "8xH200")
    disk, num = found.disk(), 4_022_468_096
    assert disk["download"] == 2 * 235_093_634_560 + 2 * num
    assert disk["checkpoints"] == 3 * 16 * num  # one at the first stage's end, and the two newest
    assert disk["student"] == 2 * num
    kept = plan_for(
        "235B", "4B", "8xH200", "evaluation.curve={every: 50, keep_best: true}", "student.adamw=8bit"
    ).disk()
    assert kept["checkpoints"] == 3 * 10 * num and kept["best weights"] == 2 * 2 * num and disk["best weights"] == 0
    # Quantised while it is loaded, the published bf16 is fetched; the FP8 checkpoint is half of that.
    loaded = plan_for("235B", "4B", "8xH200", "teacher.quantization=fp8").disk()
    published = plan_for("Qwen/Qwen3-235B-A22B-FP8", "4B", "8xH200").disk()
    assert loaded["download"] == disk["download"]
    assert published["download"] == weight_bytes(SIZES["235B-A22B"], 1) + 2 * num
    # The embedded run left 8,368,628 bytes of tensors in each of its three checkpoints.
    assert plan_for("tiny", "nano").disk()["checkpoints"] == pytest.approx(3 * 8_360_948, rel=0.01)


def test_lora_trains_what_its_rank_says() -> None:
    config = resolve_run(teacher="32B", student="4B", assignments=["student.lora.rank=8"])
    attention = 2 * (2560 + 4096) + 2 * (2560 + 1024)
    assert trained_parameters(SIZES["4B"], config) == 36 * 8 * (attention + 3 * (2560 + 9728))


# The command.


def typed(*arguments: str) -> tuple[int, str, str]:
    """Runs a command; exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["distill", *arguments])
        code = cli._exit_code()
    return code, out.getvalue(), err.getvalue()


def test_who_reads_a_plan_is_told_how_to_say_lengths() -> None:
    def told(*options: str) -> bool:
        _, out, _ = typed(*options, "--teacher", "32B", "--student", "4B")
        return "`distill plan` takes other lengths by --think-tokens" in out

    # A dry run has no such options, so the command is named.
    assert told("plan") and told("run", "--dry-run")
    assert not told("plan", "--think-tokens", "3000")


def test_standard_output_is_one_document() -> None:
    code, out, _ = typed("plan", "--teacher", "235B", "--student", "4B", "--gpus", "8xH200", "--price", "3.5", "--json")
    found = json.loads(out)
    assert code == 0 and found["layout"]["usd"] == pytest.approx(3.5 * found["layout"]["gpu_hours"])
    assert {phase["bottleneck"] for phase in found["phases"]} <= {"compute", "memory bandwidth", "wire", "latency"}
    by_phase = {(phase["stage"], phase["role"]): phase["memory"] for phase in found["phases"]}
    assert "states" not in by_phase["off_policy", "student_train"]
    assert by_phase["on_policy", "student_train"]["states"] > 256 / 4 * 4096 * 8192
    assert by_phase["on_policy", "teacher_score"]["weights"] == 2 * 235_093_634_560 // 4
    assert all(0 < sum(parts.values()) < 141e9 for parts in by_phase.values())
    memory = found["memory"]
    assert set(memory) == {"student, training", "student, sampling", "teacher, generating", "teacher, scoring"}
    assert {"weights", "moments", "gradients", "activations", "tiles", "states"} <= set(memory["student, training"])
    assert {"weights", "KV cache", "hidden states"} <= set(memory["teacher, scoring"])
    assert set(found["roles"]) == {"teacher_generate", "student_train", "student_sample", "teacher_score", "evaluate"}
    assert found["wire_bytes_per_token"] == 8192 and found["hardware"]["H200"]["source"]


def test_the_lines_say_what_people_ask() -> None:
    text = "\n".join(lines(plan_for("235B", "4B", "8xH200", price=3.5)))
    for said in (
        "GPU-hours, $",
        "limited by",
        "memory bandwidth",
        "other layouts:",
        "disk:",
        "on the wire: 8,192 bytes",
    ):
        assert said in text, said


def test_nothing_that_fits_is_exit_code_2() -> None:
    code, out, err = typed("plan", "--teacher", "235B", "--student", "4B", "--gpus", "1xL40S", "--json")
    assert (code, out) == (2, "") and "what would" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8xH100", "--gpus-student", "8xH100"], "--gpus is one pool for both"),
        (["--gpus-student", "8xH100"], "--gpus-teacher is missing"),
        (["--gpus-teacher", "8xA100", "--gpus-student", "8xH100"], "--gpus-teacher '8xA100'"),
        (["--teacher", "me/some-model"], "its shape is not known before it is downloaded"),
        (["--teacher", "5B"], "nearest"),
        (["--hardware", "/nowhere.yaml"], "cannot be read"),
        (["--price", "inf"], "--price"),
        (["--price", "nan"], "--price"),
        (["--no-think-tokens", "inf"], "--no-think-tokens"),
        (["--no-think-tokens", "nan"], "--no-think-tokens"),
    ],
)
def test_wrong_words_are_exit_code_2(arguments: list[str], said: str) -> None:
    base = [] if "--teacher" in arguments else ["--teacher", "235B", "--student", "4B"]
    code, out, err = typed("plan", *base, *arguments)
    assert (code, out) == (2, "") and said in err


def test_a_folder_s_shape_is_read(home: Path) -> None:
    folder = home / "mine"
    folder.mkdir()
    (folder / "config.json").write_text((ROOT / "distill/embedded/nano/config.json").read_text())
    assert plan_for("tiny", str(folder)).pair.student == shape_of("nano")
    whole = json.loads((folder / "config.json").read_text())
    for text in (
        '{"model_type": "qwen3"}',
        "[]",
        "{",
        *(json.dumps({**whole, name: value}) for name in ("num_hidden_layers", "head_dim") for value in ("2", -1, 2.5)),
        json.dumps({**whole, "num_key_value_heads": None}),
        json.dumps({**whole, "num_attention_heads": 0, "head_dim": None}),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            plan_for("tiny", str(folder))


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["8xH200", "2x8xH100", "1xRTX4090", "3xB200", "0xH100", "1e9xH100", "8xA100", "x", "999999999xH200"]
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gpus=WORDS,
    student=st.sampled_from(["4B", "0.6B", "235B", ""]),
    option=st.sampled_from(["--gpus", "--gpus-teacher"]),
)
def test_fuzzed_devices_are_a_plan_or_a_sentence(gpus: str, student: str, option: str) -> None:
    code, out, err = typed("plan", "--teacher", "32B", "--student", student, f"{option}={gpus}", "--json")
    assert code in (0, 2) and "Traceback" not in err
    if code == 0:
        json.loads(out)
    else:
        assert out == "" and err.strip()


def test_a_plan_and_a_dry_run_import_no_torch() -> None:
    for words in (["plan", "--teacher", "235B", "--student", "4B"], ["run", "--dry-run"]):
        code = (
            f"import sys; sys.argv = ['distill', *{words!r}]; from distill.cli import _exit_code; code = _exit_code(); "
            "print([name for name in ('torch', 'transformers', 'pandas', 'datasets') if name in sys.modules], code, "
            "file=sys.stderr)"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.stderr.strip().endswith("[] 0"), result.stderr


def test_a_dry_run_shows_the_plan() -> None:
    code, out, _ = typed("run", "--dry-run", "--teacher", "235B", "--student", "4B", "--json")
    found = json.loads(out)
    same = document(plan_for("235B", "4B"))
    assert code == 0 and found["estimate"]["layout"] == same["layout"] and found["no_estimate"] is None
    code, out, _ = typed("run", "--dry-run")
    assert code == 0 and "#   tiny -> nano on 1xCPU" in out and "limited by" in out
    config = out[: out.index("# into")]
    assert "teacher:" in config
    code, out, _ = typed("run", "--dry-run", "--teacher", "me/model", "--student", "4B", "--json")
    assert code == 0 and json.loads(out)["estimate"] is None and "not known" in json.loads(out)["no_estimate"]


def test_a_server_that_samples_is_for_one_machine() -> None:
    words = ["--teacher", "32B", "--student", "8B", "--set", "sampler.backend=vllm"]
    code, out, _ = typed("run", "--dry-run", "--json", *words, "--processes", "2")
    assert code == 0 and json.loads(out)["estimate"]["layout"]["student"]["processes"] == 2
    code, out, _ = typed("run", "--dry-run", "--json", *words, "--nodes", "2", "--node-address", "gpu-1")
    assert code == 0 and "asked for 2 machines; set it to transformers" in json.loads(out)["no_estimate"]


HELD = {
    "0.6b": (1, "alone"),
    "1.7b": (1, "alone"),
    "4b": (2, "sharded"),
    "8b": (4, "sharded"),
    "14b": (8, "sharded"),
    "30b": (64, "sharded"),
}
"""Of every student size: how many GPUs of 80 GB it takes at the least, and how they hold it; whoever teaches it."""


@pytest.mark.parametrize("name", recipe_names())
def test_a_dry_run_of_every_recipe_says_how_the_student_is_held_and_what_each_process_needs(name: str) -> None:
    code, out, err = typed("run", "--dry-run", "--recipe", name)
    assert code == 0, err
    said = re.search(r"student: (\d+) process(?:es)?, (\w+); ([\d.]+) GB each at most, which (\w+)", out)
    assert said is not None, out
    # The plain recipe names a teacher that the student's processes would have to hold; the layout below it does not.
    pair, fits = name.partition("-to-")[2], name != "qwen3"
    expected = HELD[pair] if pair else (1, "alone") if fits else (128, "sharded")
    assert (int(said[1]), said[2], said[4]) == (*expected, "fits" if fits else "DOES")

    # The parts, of which training and sampling take turns, add up.
    section = out[said.end() :].partition("\n#\n")[0]
    parts = {part: float(size) for part, size in re.findall(r"^#     ([\w ]+): ([\d.]+) GB$", section, re.MULTILINE)}
    stays = sum(parts.pop(part, 0.0) for part in ("weights", "masters", "moments", "teacher"))
    sampling = parts.pop("sampling")
    assert float(said[3]) == pytest.approx(stays + max(sampling, sum(parts.values())), abs=0.12)
    assert {"gradients", "activations"} <= parts.keys() and ("gathered" in parts) == (said[2] == "sharded")
    assert "student, training: " in out and "the cheapest layout that fits" in out

    code, out, _ = typed("run", "--dry-run", "--recipe", name, "--json")
    memory = json.loads(out)["memory"]
    assert (memory["processes"], memory["engine"], memory["fits"]) == (*expected, fits)
    assert memory["bytes"]["total"] / 1e9 == pytest.approx(float(said[3]), abs=0.051)


@pytest.mark.parametrize(
    ("arguments", "models", "least"),
    [
        (["--nodes", "2"], ["tiny", "nano"], 2),
        (["--nodes", "3", "--processes", "2"], ["tiny", "nano"], 6),
        (["--nodes", "2"], ["4B", "0.6B"], 2),
        (["--nodes", "2"], ["235B", "14B"], 2),
        (["--nodes", "2", "--processes", "4"], ["32B", "8B"], 8),
    ],
)
def test_a_dry_run_is_on_as_many_machines_as_the_run(arguments: list[str], models: list[str], least: int) -> None:
    num = int(arguments[1])
    words = ["--teacher", models[0], "--student", models[1], "--node-address", "gpu-1", *arguments]
    began = time.perf_counter()
    code, out, _ = typed("run", "--dry-run", "--json", *words)
    assert time.perf_counter() - began < 60  # a run waits for the others for minutes
    found = json.loads(out)
    assert code == 0 and found["no_estimate"] is None, found["no_estimate"]
    processes = found["estimate"]["layout"]["student"]["processes"]
    assert processes % num == 0 and processes >= least and found["memory"]["processes"] % num == 0
    assert processes == least or "--processes" not in arguments
    # Each of the machines has its command, with as many processes.
    runs = [line for line in found["estimate"]["commands"] if "distill run" in line]
    each = f" --processes {processes // num} " if processes > num else " "
    assert len(runs) == num and all(f"{each}--nodes {num} --node-rank {rank} " in runs[rank] for rank in range(num))
    assert found["estimate"]["layout"]["gpus"] >= processes


# The documentation.


def test_the_documented_output_is_what_is_printed() -> None:
    shown = (ROOT / "docs/plan.md").read_text().partition("235B -> 4B on 8xH200")
    block = (shown[1] + shown[2]).partition("\n```")[0].splitlines()
    printed = list(lines(plan_for("235B", "4B", "8xH200", price=3.5)))
    assert len(block) == 15 and [line for line in block if line not in printed] == ["..."]


def test_the_documented_sentence_is_what_is_said() -> None:
    with pytest.raises(UserError) as error:
        plan_for("235B", "4B", "4xL40S")
    assert str(error.value) in " ".join((ROOT / "docs/plan.md").read_text().split())


def test_the_documented_gpu_hours_of_an_8b_student_are_what_the_plan_gives() -> None:
    text = (ROOT / "docs/plan.md").read_text()
    rows = re.findall(r"^\| (\d+)[^|]*\| ([\d,]+) \| (\d+) \| ([\d,]+) \| (\d+) \| ([\d,]+) \|$", text, re.M)
    assert len(rows) == 4
    for row in rows:
        steps, limit, gpus, sample, train, together = (int(cell.replace(",", "")) for cell in row)
        limits = f"stages.on_policy.sampling.think.max_new_tokens={limit}"
        best = plan_for("235B", "8B", "2x8xH100", f"stages.on_policy.steps={steps}", limits).best
        phases = {phase.job.role: phase for phase in best.phases if phase.job.stage == "on_policy"}
        hours = {role: best.layout.gpus * phase.seconds / 3600 for role, phase in phases.items()}
        assert phases["teacher_score"].is_hidden and best.layout.gpus == gpus
        assert [hours["student_sample"], hours["student_train"]] == pytest.approx([sample, train], abs=0.5)
        assert hours["student_sample"] + hours["student_train"] == pytest.approx(together, abs=0.5)


# This machine.


def test_two_measurements_give_share_and_latency_back() -> None:
    small, large = Times(compute=0.01, latency=5e-6), Times(compute=0.4, latency=9e-6)
    measured = [one.compute / 0.25 + one.latency * 800 for one in (small, large)]
    assert solve(small, measured[0], large, measured[1]) == pytest.approx((0.25, 800))
    # Noise: the small one took no longer than its share of the large one.
    share, latency = solve(small, 0.001, large, 1.6)
    assert (share, latency) == (pytest.approx(0.25), 0.0)
    # Noise: the large one took hardly longer than the small one.
    share, latency = solve(small, 1.0, large, 1.0)
    assert share > 0 and latency > 0
    assert large.compute / share + large.latency * latency == pytest.approx(1.0)
    # A share beyond what can be is cut, and the latency is that of the rest.
    share, latency = solve(small, 0.01 / 8 + 5e-6 * 800, large, 0.4 / 8 + 9e-6 * 800)
    assert share == 4.0 and large.latency * latency == pytest.approx(max(0.0, 0.4 / 8 + 9e-6 * 800 - 0.1), abs=1e-12)


def test_a_plan_says_that_its_figures_were_measured() -> None:
    before = plan_for("tiny", "nano").best.seconds
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text("CPU:\n  tflops: {fp32: 0.01, bf16: 0.01}\n  measured: 2026-01-02, a test\n")
    found = plan_for("tiny", "nano")
    assert any("CPU: measured, 2026-01-02, a test" in note for note in notes(found))
    assert found.best.seconds > 3 * before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_plan_of_the_embedded_pair_is_within_a_factor_of_two(home: Path) -> None:
    """Calibrate, plan, run, and compare phase by phase; all on this machine as it is now."""
    short = ["stages.off_policy.num_prompts=512", "stages.on_policy.steps=40", "evaluation.num_questions=256"]
    sets = [word for text in short for word in ("--set", text)]
    found = measured_plan(sets)
    run = [sys.executable, "-m", "distill.cli", "run", "--out", str(home / "run"), "--json", *sets]
    result = subprocess.run(
        [*run, "--store", str(home / "store")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    costs = json.loads(result.stdout)["costs"]
    seconds: dict[str, dict[str, float]] = {}
    for phase in found["phases"]:
        role = phase["role"]
        key = role if role == "evaluate" else f"{phase['stage']} {role}"
        measured = sum(cost["seconds"] for cost in costs[role]["stages"].values())
        if role != "evaluate":
            measured = costs[role]["stages"][phase["stage"]]["seconds"]
        entry = seconds.setdefault(key, {"planned": 0.0, "measured": measured})
        entry["planned"] += phase["seconds"]
    print(json.dumps(seconds, indent=1))
    assert len(seconds) == 6
    for key, entry in seconds.items():
        assert 0.5 < entry["planned"] / entry["measured"] < 2, (key, entry)
    assert any("measured" in note for note in found["notes"])


def measured_plan(sets: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "distill.cli", "plan", "--calibrate", "--json", *sets]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "calibration.yaml" in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found
