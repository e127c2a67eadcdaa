"""How long each job of a run takes on a layout, and what limits it.

Per device, with N_a active parameters of b bytes, V vocabulary rows, T tokens of the job on this device:

    decode   FLOPs of one pass of every token; memory: the weights once a step (of experts those that some row chose),
             keys and values of every earlier token, ``LOGIT_PASSES`` passes over fp32 logits; as many steps as the rows
             that are decoded together need for all tokens, and no fewer than the longest response has
    score    one pass over all tokens; weights once every ``PASS_TOKENS`` in servers, in the student's processes once
             every ``teacher.batch_tokens``; without the head, which the loss applies. The student, over what it said:
             weights once a micro-batch, and the head at the rows of the response
    train    three passes (LoRA two), one more of the body with checkpointing; 2 d_t V for the teacher's head and
             ``TILE_PASSES`` over logits where a teacher judges; activations written and read; 30 bytes a parameter for
             AdamW's step
    wire     tensor parallel: two all-reduces a layer, 2 (tp - 1) / tp of the states each; DDP: 8 (W - 1) / W bytes a
             parameter and step; FSDP2: 2 b + 4 bytes a parameter and micro-batch; hidden states over HTTP

FLOPs of a pass are ``distill.costs.sequence_flops``. Sources: arXiv 2211.05102 (inference: weights and cache against
compute), arXiv 1909.08053 (two all-reduces a layer), arXiv 2304.11277 (FSDP's traffic), the ring all-reduce's
2 (n - 1) / n. Left out: imbalance between processes, prefix caching, loading models, starting servers, checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import replace

from distill.adapters import adapter_parameters
from distill.config import RunConfig
from distill.costs import training_passes
from distill.family import Shape
from distill.hardware import Number, Pool
from distill.memory import cache_bytes, layer_bytes, pass_tokens
from distill.model_config import TeacherSettings
from distill.roofline import Demand, Times, times
from distill.server_memory import PASS_TOKENS, Bytes, ServerMemory, weight_bytes
from pipelines.layouts import Layout, Pair
from pipelines.workload import Job, Sequences

LOGIT_PASSES = 8
"""Reads and writes of a row of fp32 logits while a token is drawn."""
TILE_PASSES = 12
"""Reads and writes of both models' logits in the loss and its gradient."""
SCORE_PASSES = 3
"""The same of one model's alone, without a gradient."""
EAGER_PASSES = 3
"""A decoding pass that Python launches kernel by kernel, in passes that a GPU replays."""
STEP_BYTES = 30
"""Memory traffic of AdamW's step, a trained parameter: gradient, master and both moments read and written, weight."""
HTTP_BYTES = 1e9
"""Bytes a second that one process takes from servers over HTTP; an assumption, measured at small sizes only."""
HOST_BYTES = 25e9
"""Bytes a second between a GPU and the machine's memory (PCIe 4.0 x16, as reached), for offload."""
ALL_REDUCE_SECONDS = 15e-6
"""Of one small all-reduce over NVLink."""
JSON_TOKEN, JSON_CANDIDATE = 76, 70
"""Bytes of a token's log-probability as JSON and of each further candidate's (docs/teacher-signals.md)."""


def wire_bytes(teacher: Shape, settings: TeacherSettings, *, local: bool) -> float:
    """Bytes a token of what a teacher says, on the wire."""
    if local:
        return 0.0
    if settings.signal == "hidden":
        return teacher.width * {"bf16": 2, "fp32": 4, "fp8": 1}[settings.wire]
    if settings.signal == "sampled":
        return JSON_TOKEN
    if settings.signal == "topk":
        return JSON_TOKEN + JSON_CANDIDATE * settings.top_k
    return 16 * settings.top_k / 3  # fp32 in base64


def job_times(job: Job, pair: Pair, layout: Layout) -> Times:
    """Of one of the job's times, by what it is spent on."""
    if job.who == "teacher" and layout.teacher.backend == "vllm":
        return _taught(job, pair, layout) if job.kind == "decode" else _serve_scoring(job, pair, layout)
    sampler = layout.student.sampler
    if job.who == "student" and job.kind == "decode" and sampler is not None:
        item: Bytes = 2 if layout.config.student.dtype == "bfloat16" else 4
        pool, config = layout.student_pool, layout.config
        return _serve_decoding(job, pair.student, sampler.memory, item, pool=pool, config=config)
    shape = pair.teacher if job.who == "teacher" else pair.student
    if job.kind == "decode":
        return _decode(job, shape, layout)
    return _score(job, shape, layout) if job.kind == "score" else _train(job, pair, layout)


def _decode(job: Job, shape: Shape, layout: Layout) -> Times:
    """In the student's processes, where a response that ends makes room for the next one."""
    config, pool, num_processes = layout.config, layout.student_pool, layout.student.processes
    item, number = _number(config, job.who)
    own = job.over(num_processes)
    num = max(1.0, sum(part.num for part in own))
    # Those that may get longest begin, and are fewest together.
    in_turn = sum(part.num * part.response / min(num, rows_together(part, config)) for part in own)
    steps = max(in_turn, *(part.longest_of(part.num) for part in own))
    written = sum(part.num * part.response for part in own)
    # Passes of these are not replayed (distill.replay).
    is_eager = bool(shape.num_experts) or (job.who == "student" and _is_sharded(layout))
    demand = Demand(
        flops=_forward(own, shape),
        memory=steps * _touched(shape, item, written / steps)
        + _cache_reads(own, shape, item)
        + written * LOGIT_PASSES * 4 * shape.vocabulary,
        wire=_gathered(shape, item, layout) if job.who == "student" else 0.0,
        passes=steps * shape.num_layers * (EAGER_PASSES if is_eager and pool.device.kind == "gpu" else 1),
    )
    wire_rate = _collective(pool, num_processes)
    return times(demand, pool.device, "sample", number, experts=bool(shape.num_experts), wire_rate=wire_rate)


def rows_together(part: Sequences, config: RunConfig) -> int:
    """Most responses of ``part`` that a student's process decodes together: each counts at its limit."""
    return max(1, min(config.sampler_batch, int(config.sampler_tokens // (part.prompt + part.limit))))


def _score(job: Job, shape: Shape, layout: Layout) -> Times:
    """One pass over whole sequences in the student's processes."""
    config, pool, num_processes = layout.config, layout.student_pool, layout.student.processes
    item, number = _number(config, job.who)
    own = job.over(num_processes)
    tokens = sum(part.tokens for part in own)
    is_student = job.who == "student"
    if is_student:
        at_once = config.student.micro_batch_tokens or tokens
    else:
        at_once = pass_tokens(config.teacher.batch_tokens, on_cpu=pool.device.kind == "cpu")
    passes = math.ceil(tokens / at_once)
    # The student's own log-probabilities are read off its head, at the rows of the response.
    rows = sum(part.num * part.response for part in own) if is_student else 0.0
    demand = Demand(
        flops=_forward(own, shape) - 2 * (tokens - rows) * shape.vocabulary * shape.width,
        memory=passes * item * shape.total_parameters
        + tokens * shape.num_layers * layer_bytes(shape, item)
        + rows * SCORE_PASSES * 4 * shape.vocabulary,
        passes=passes * shape.num_layers,
    )
    return times(demand, pool.device, "score", number, experts=bool(shape.num_experts))


def _train(job: Job, pair: Pair, layout: Layout) -> Times:
    config, pool, num_processes = layout.config, layout.student_pool, layout.student.processes
    shape, settings = pair.student, config.student
    item, number = _number(config, "student")
    own = job.over(num_processes)
    tokens, responses = sum(part.tokens for part in own), sum(part.num * part.response for part in own)
    passes = math.ceil(tokens / (settings.micro_batch_tokens or tokens))
    head = shape.vocabulary * shape.width
    # The head is projected at the rows of the response alone, and never twice.
    once = _forward(own, shape) - 2 * tokens * head
    rounds = training_passes(settings)
    flops = (rounds + settings.gradient_checkpointing) * once + rounds * 2 * responses * head
    memory: float = passes * rounds * item * shape.total_parameters
    memory += 2 * tokens * shape.num_layers * layer_bytes(shape, item)
    memory += STEP_BYTES * trained_parameters(shape, config) / (num_processes if _is_sharded(layout) else 1)
    memory += responses * TILE_PASSES * 4 * shape.vocabulary
    if job.judged:
        flops += 2 * responses * pair.teacher.vocabulary * pair.teacher.width
    demand = Demand(flops, memory, _train_wire(shape, item, passes, layout), passes * shape.num_layers)
    wire_rate = _collective(pool, num_processes)
    found = times(demand, pool.device, "train", number, experts=bool(shape.num_experts), wire_rate=wire_rate)
    if settings.cpu_offload:
        # Slices go to the GPU for every pass, forward and backward, their gradients back, and the step is taken there.
        sliced = shape.total_parameters / num_processes
        found = replace(found, wire=found.wire + (passes * 12 * sliced + STEP_BYTES * sliced) / HOST_BYTES)
    return found


def _train_wire(shape: Shape, item: int, passes: int, layout: Layout) -> float:
    num_processes = layout.student.processes
    share = (num_processes - 1) / num_processes
    if _is_sharded(layout):
        # Embedding and head are gathered once, a layer for each pass forward and backward; gradients are fp32.
        ends = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        gathered = item * (ends + 2 * passes * (shape.total_parameters - ends))
        return (gathered + passes * 4 * shape.total_parameters) * share
    return 8 * trained_parameters(shape, layout.config) * share


def _taught(job: Job, pair: Pair, layout: Layout) -> Times:
    """The teacher speaks in its servers."""
    held = layout.teacher
    return _serve_decoding(
        job,
        pair.teacher,
        held.servers["generate"],
        held.item,
        pool=layout.teacher_pool,
        config=layout.config,
        cut=(held.tensor_parallel, held.pipeline_parallel),
        replicas=held.replicas,
    )


def _serve_decoding(
    job: Job,
    shape: Shape,
    server: ServerMemory,
    item: Bytes,
    *,
    pool: Pool,
    config: RunConfig,
    cut: tuple[int, int] = (1, 1),
    replicas: int = 1,
) -> Times:
    """In vLLM servers, where a response that ends makes room for the next one; ``cut`` are each one's tp and pp."""
    number, computed = _served_number(item)
    tensor_parallel, pipeline_parallel = cut
    own = job.over(replicas)
    written = sum(part.num * part.response for part in own)
    num = sum(part.num for part in own)
    mean = sum(part.tokens for part in own) / num
    slots = min(num, server.slots(mean, config.sampler_batch))
    steps = max(written / slots, max(part.longest_of(part.num) for part in own))
    num_gpus = tensor_parallel * pipeline_parallel
    rows = written / steps / pipeline_parallel
    demand = Demand(
        flops=_forward(own, shape) / num_gpus,
        memory=steps * _touched(shape, item, rows) / tensor_parallel
        + _cache_reads(own, shape, computed) / pipeline_parallel / min(tensor_parallel, shape.num_kv_heads)
        + written * LOGIT_PASSES * 4 * shape.vocabulary / num_gpus,
        wire=_all_reduced(sum(part.tokens for part in own), shape, *cut),
        passes=steps * shape.num_layers,
    )
    wire_rate = _collective(pool, tensor_parallel)
    found = times(demand, pool.device, "serve", number, experts=bool(shape.num_experts), wire_rate=wire_rate)
    if tensor_parallel > 1:
        found = replace(found, latency=found.latency + demand.passes * 2 * ALL_REDUCE_SECONDS)
    return found


def _serve_scoring(job: Job, pair: Pair, layout: Layout) -> Times:
    """In vLLM servers, and over the wire to the student's processes."""
    shape, held, pool = pair.teacher, layout.teacher, layout.teacher_pool
    number, computed = _served_number(held.item)
    own = job.over(held.replicas)
    tokens = sum(part.tokens for part in own)
    cut = held.tensor_parallel * held.pipeline_parallel
    passes = math.ceil(tokens / PASS_TOKENS)
    demand = Demand(
        flops=(_forward(own, shape) - 2 * tokens * shape.vocabulary * shape.width) / cut,
        memory=(passes * weight_bytes(shape, held.item) + tokens * shape.num_layers * layer_bytes(shape, computed))
        / cut,
        wire=_all_reduced(tokens, shape, held.tensor_parallel, held.pipeline_parallel),
        passes=passes * shape.num_layers / held.pipeline_parallel,
    )
    wire_rate = _collective(pool, held.tensor_parallel)
    found = times(demand, pool.device, "score", number, experts=bool(shape.num_experts), wire_rate=wire_rate)
    # A server's passes cost what its decoding steps do, not what eager ones in a trainer's process do.
    found = replace(found, latency=demand.passes * pool.device.latency.serve * 1e-6)
    num_processes = layout.student.processes
    rate = num_processes * min(HTTP_BYTES, layout.student_pool.device.network * 1e9)
    travels = job.sequence_tokens * wire_bytes(shape, layout.config.teacher, local=False)
    return replace(found, wire=found.wire + travels / rate)


def trained_parameters(shape: Shape, config: RunConfig) -> int:
    lora = config.student.lora
    return shape.total_parameters if lora is None else adapter_parameters(shape, lora)


def _number(config: RunConfig, who: str) -> tuple[int, Number]:
    """Bytes and type of the numbers that somebody in the student's processes computes in."""
    dtype = config.teacher.dtype if who == "teacher" else config.student.dtype
    return (2, "bf16") if dtype == "bfloat16" else (4, "fp32")


def _served_number(item: Bytes) -> tuple[Number, int]:
    """Type in which servers multiply weights of so many bytes, and bytes of what is not quantised."""
    return ("fp8" if item == 1 else "bf16" if item == 2 else "fp32", 4 if item == 4 else 2)


def _forward(sequences: tuple[Sequences, ...], shape: Shape) -> float:
    return sum(part.forward_flops(shape) for part in sequences)


def _touched(shape: Shape, item: int, rows: float) -> float:
    """Bytes of the weights that a step of ``rows`` tokens reads: of experts those that some token was sent to."""
    experts = 3 * shape.width * shape.mlp_width * shape.num_experts * shape.num_layers
    unread = 0 if shape.tied else shape.vocabulary * shape.width  # of the embedding a row a token
    chosen = 1 - (1 - shape.experts_per_token / shape.num_experts) ** rows if shape.num_experts else 0.0
    return item * (shape.total_parameters - unread - experts * (1 - chosen))


def _cache_reads(sequences: tuple[Sequences, ...], shape: Shape, item: int) -> float:
    """Bytes of keys and values that are read while the responses are written."""
    return cache_bytes(shape, item) * sum(
        part.num * part.response * (part.prompt + part.response / 2) for part in sequences
    )


def _gathered(shape: Shape, item: int, layout: Layout) -> float:
    """Bytes that make a sharded student whole, to sample from it."""
    num_processes = layout.student.processes
    return item * shape.total_parameters * (num_processes - 1) / num_processes if _is_sharded(layout) else 0.0


def _all_reduced(tokens: float, shape: Shape, size: int, groups: int) -> float:
    """Bytes of the states that a GPU of a server of tp ``size`` and pp ``groups`` exchanges with its peers."""
    return 2 * shape.num_layers / groups * tokens * shape.width * 2 * 2 * (size - 1) / size


def _collective(pool: Pool, num: int) -> float:
    """Bytes a second of the wire between ``num`` devices."""
    return (pool.device.link if num <= pool.per_node else pool.device.network) * 1e9


def _is_sharded(layout: Layout) -> bool:
    return layout.student.engine == "sharded"
