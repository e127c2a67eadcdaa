"""A plan as one document, and what goes with it: memory by phase, the commands."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

from distill.memory import STAYS, Load, Memory, layer_bytes, student_memory
from distill.server_memory import ServerMemory
from distill.vllm.launch import Role
from pipelines.layouts import Layout
from pipelines.placement import Part, Placement, placement
from pipelines.plan import Estimate, Phase, Plan
from pipelines.plan_notes import notes

PORTS: dict[Role, int] = {"generate": 8001, "score": 8101}
"""Of the first server of each role, in the commands that a plan proposes."""


def document(plan: Plan) -> dict[str, Any]:
    """Everything the plan knows. Bytes are of one GPU, seconds of the whole run, money in USD."""
    best = plan.best
    return {
        "teacher": {"model": plan.config.teacher.model, **_model(plan, "teacher")},
        "student": {"model": plan.config.student.model, **_model(plan, "student")},
        "devices": str(plan.devices),
        "hardware": {pool.name: pool.device.model_dump(mode="json") for pool in plan.devices.pools},
        "layout": _layout(best),
        "memory": memory_by_phase(best.layout),
        "phases": [_phase(phase, plan) for phase in best.phases],
        "steps": [
            {"stage": step.stage, "times": step.num, "seconds": step.seconds, "order": step.order}
            for step in best.steps
        ],
        "roles": {role: {"tokens": tokens, "flops": flops} for role, (tokens, flops) in plan.flops_by_role().items()},
        "wire_bytes_per_token": plan.wire_bytes(),
        "disk_bytes": plan.disk(),
        "commands": commands(plan),
        "others": [{"what": name, **_layout(one)} for name, one in plan.others],
        "does_not_fit": list(plan.shortages),
        "lengths": asdict(plan.work.lengths),
        "notes": notes(plan),
    }


def _model(plan: Plan, who: str) -> dict[str, int]:
    shape = getattr(plan.pair, who)
    return {"parameters": shape.total_parameters, "active_parameters": shape.active_parameters}


def _layout(one: Estimate) -> dict[str, Any]:
    layout, teacher = one.layout, one.layout.teacher
    return {
        "gpus": layout.gpus,
        "shared": layout.is_shared,
        "teacher": {
            "backend": teacher.backend,
            "gpus": teacher.gpus,
            "tensor_parallel": teacher.tensor_parallel,
            "pipeline_parallel": teacher.pipeline_parallel,
            "expert_parallel": teacher.expert_parallel,
            "replicas": teacher.replicas,
            "weight_bytes": teacher.item,
        },
        "student": {
            "processes": layout.student.processes,
            "engine": layout.student.engine,
            "lora": layout.config.student.lora is not None,
            "cpu_offload": layout.config.student.cpu_offload,
            "micro_batch_tokens": layout.config.student.micro_batch_tokens,
            "sampler_tokens": layout.config.sampler_tokens,
            "sampler": layout.config.sampler.backend,
            "sampler_gpus": layout.student.devices - layout.student.processes,
        },
        "changes": list(layout.changes),
        "assignments": list(layout.assignments),
        "seconds": one.seconds,
        "gpu_hours": one.gpu_hours,
        "busy_gpu_hours": {who: one.busy(who) for who in ("teacher", "student")},
        "usd": one.usd,
    }


def _phase(phase: Phase, plan: Plan) -> dict[str, Any]:
    return {
        "stage": phase.job.stage,
        "role": phase.job.role,
        "who": phase.job.who,
        "times": phase.job.times,
        "seconds_each": phase.each.seconds,
        "seconds": phase.seconds,
        "hidden": phase.is_hidden,
        "seconds_hidden": phase.hidden,
        "bottleneck": phase.bottleneck,
        "seconds_by": asdict(phase.each),
        "memory": phase_memory(phase, plan),
        "tokens": phase.job.tokens,
        "flops": phase.flops,
    }


def memory_by_phase(layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes of one device at the most, by whose device it is and what is done, by part.

    Every response is taken at its limit. A server's cache is what vLLM takes, all that is left.
    """
    found = {
        "student, training": _training_parts(layout.student.memory),
        "student, sampling": _speaking_parts(layout),
    }
    for role, doing in (("generate", "generating"), ("score", "scoring")):
        if role in layout.teacher.servers:
            found[f"teacher, {doing}"] = _server_parts(layout.teacher.servers[role])
    return found


def phase_memory(phase: Phase, plan: Plan) -> dict[str, int]:
    """Bytes of one of the devices that work, by part, in this phase."""
    layout, job = plan.best.layout, phase.job
    if job.who == "teacher" and not layout.is_shared:
        return _server_parts(layout.teacher.servers["score" if job.kind == "score" else "generate"])
    if job.kind == "decode":
        return _speaking_parts(layout) if job.who == "student" else _sampling_parts(layout.student.memory)
    stage = {job.stage: layout.config.stages[job.stage]}
    config = layout.config.model_copy(update={"stages": stage})
    memory = student_memory(
        config,
        plan.pair.student,
        plan.pair.teacher,
        processes=layout.student.processes,
        engine=layout.student.engine,
        device="cuda" if layout.student_pool.device.kind == "gpu" else "cpu",
    )
    parts = _training_parts(memory)
    if not job.judged and job.kind == "train":
        parts.pop("states")
    if job.kind == "score":
        stays = {name: size for name, size in parts.items() if name in STAYS}
        if job.who == "student":
            item = 2 if layout.config.student.dtype == "bfloat16" else 4
            tokens = Load.of(config, layout.student.processes).micro_batch_tokens
            gathered = item * plan.pair.student.total_parameters if layout.student.engine == "sharded" else 0
            found = {"activations": tokens * layer_bytes(plan.pair.student, item), "tiles": parts["tiles"]}
            return {**stays, **found, **({"gathered": gathered} if gathered else {})}
        kept = {**stays, "states": parts["states"]}
        item = 2 if plan.config.teacher.dtype == "bfloat16" else 4
        held = layer_bytes(getattr(plan.pair, job.who), item)
        return {**kept, "activations": plan.config.teacher.batch_tokens * held}
    return parts


def _training_parts(memory: Memory) -> dict[str, int]:
    return {name: size for name, size in memory.parts.items() if size and name != "sampling"}


def _speaking_parts(layout: Layout) -> dict[str, int]:
    """Of the student: where a vLLM speaks on a GPU of its own, of that one."""
    sampler = layout.student.sampler
    if sampler is not None and sampler.devices and layout.student_pool.device.kind == "gpu":
        return _server_parts(sampler.memory)
    return _sampling_parts(layout.student.memory)


def _sampling_parts(memory: Memory) -> dict[str, int]:
    stays = {name: memory.parts[name] for name in STAYS if memory.parts[name]}
    return {**stays, **({"KV cache and gathered weights": sampling} if (sampling := memory.parts["sampling"]) else {})}


def _server_parts(server: ServerMemory) -> dict[str, int]:
    return {**{name: size for name, size in server.parts.items() if size}, "KV cache": server.room}


def commands(plan: Plan) -> list[str]:
    """What to type for the best layout; where there are several machines, a comment says on which."""
    layout = plan.best.layout
    model = next((text for text in layout.assignments if text.startswith("teacher.model=")), None)
    teacher = plan.config.teacher.model if model is None else model.partition("=")[2]
    rest = [text for text in layout.assignments if text != model]
    run = ["distill", "run", "--teacher", teacher, "--student", plan.config.student.model, *plan.asked]
    placed = placement(
        layout.teacher, layout.student, (layout.teacher_pool, layout.student_pool), is_one=plan.devices.is_one
    )
    assert placed is not None, "a layout that no machines hold is not planned"
    hosts = _Hosts(placed, is_one=plan.devices.is_one)
    if placed.sampler and hosts.is_divided:
        rest.append(f"sampler.devices={json.dumps([str(gpu) for gpu in placed.sampler])}")
    if layout.is_shared:
        return hosts.run([*run, *_sets(rest)])
    serve = ["distill", "teacher", "serve", "--teacher", teacher, "--tp", str(layout.teacher.tensor_parallel)]
    if layout.teacher.pipeline_parallel > 1:
        serve += ["--pp", str(layout.teacher.pipeline_parallel)]
    if plan.config.teacher.quantization or "teacher.quantization=fp8" in rest:
        serve += ["--quantization", plan.config.teacher.quantization or "fp8"]
    # Log-probabilities are read by the servers that generate.
    judge: Role = "score" if plan.config.teacher.signal == "hidden" else "generate"
    roles = {role: port for role, port in PORTS.items() if role in ("generate", judge)}
    served: list[str] = []
    urls: dict[Role, list[str]] = {}
    for role, port in roles.items():
        lines, urls[role] = hosts.serve([*serve, "--role", role], port)
        served += lines
    asked: list[tuple[str, Role]] = [("generate", "generate"), ("score", judge)]
    # The run is told how its teacher is quantised too: the responses are stored under that.
    urls_of = [f"teacher.urls.{key}=[{', '.join(urls[role])}]" for key, role in asked]
    return [*served, *hosts.run([*run, *_sets([*rest, *urls_of])])]


class _Hosts:
    """Names of the machines, and commands on each of them."""

    def __init__(self, placed: Placement, *, is_one: bool) -> None:
        self._placed, self._is_one = placed, is_one
        students, servers = placed.student, [part for server in placed.servers for part in server]
        names = {self._name(part, "STUDENT") for part in students} | {self._name(part, "TEACHER") for part in servers}
        self._is_several = len(names) > 1
        self.is_divided = bool(servers) and is_one

    def run(self, words: list[str]) -> list[str]:
        """The run, once for each of the student's machines."""
        parts = self._placed.student
        if len(parts[0].gpus) > 1 or len(parts) > 1 or self._placed.sampler:
            words = [*words, "--processes", str(len(parts[0].gpus))]
        return [
            self._line(part, "STUDENT", [*words, *self._nodes(parts, rank, "STUDENT")])
            for rank, part in enumerate(parts)
        ]

    def serve(self, words: list[str], port: int) -> tuple[list[str], list[str]]:
        """One command for each machine of each server, those of one machine together; and the servers' addresses."""
        lines, urls = [], []
        whole: dict[int, list[Part]] = {}
        listen = ["--host", "0.0.0.0"] if self._is_several else []
        for server in self._placed.servers:
            if len(server) == 1:
                whole.setdefault(server[0].machine, []).append(server[0])
                continue
            urls.append(self._url(server[0], port))
            for rank, part in enumerate(server):
                at = [*listen, "--port", str(port), *self._nodes(server, rank, "TEACHER")]
                lines.append(self._line(part, "TEACHER", [*words, *at]))
        for machine, parts in whole.items():
            together = Part(machine, tuple(gpu for part in parts for gpu in part.gpus))
            replicas = ["--replicas", str(len(parts))] if len(parts) > 1 else []
            lines.append(self._line(together, "TEACHER", [*words, *listen, "--port", str(port), *replicas]))
            urls += [self._url(together, port + place) for place in range(len(parts))]
        return lines, urls

    def _name(self, part: Part, side: str) -> str:
        return f"HOST_{part.machine}" if self._is_one else f"{side}_HOST_{part.machine}"

    def _url(self, part: Part, port: int) -> str:
        return f"http://{self._name(part, 'TEACHER') if self._is_several else '127.0.0.1'}:{port}"

    def _nodes(self, parts: tuple[Part, ...], rank: int, side: str) -> list[str]:
        if len(parts) == 1:
            return []
        first = self._name(parts[0], side)
        return ["--nodes", str(len(parts)), "--node-rank", str(rank), "--node-address", first]

    def _line(self, part: Part, side: str, words: list[str]) -> str:
        visible = f"CUDA_VISIBLE_DEVICES={','.join(map(str, part.gpus))} " if self.is_divided else ""
        return f"{visible}{shlex.join(words)}{f'  # on {self._name(part, side)}' if self._is_several else ''}"


def _sets(assignments: list[str]) -> list[str]:
    return [word for text in assignments for word in ("--set", text)]
