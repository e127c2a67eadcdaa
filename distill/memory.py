"""How much memory a process of a run needs: the formula behind the choice of engine, ``--dry-run`` and the docs.

Bytes, for a student of N parameters of b bytes each (2 or 4), N_t of them trained, L layers of width d, a vocabulary of
V, over W processes, with T tokens in a micro-batch and R response tokens in a process's share of a step:

    weights        alone, replicated: b N         sharded: 4 N / W, fp32: they are the masters
    masters        16-bit students: 4 N_t         sharded: none
    moments        8 N_t in fp32, 2 N_t in 8 bit  sharded: / W
    gradients      b N_t, and for 16-bit students the sum of the micro-batches in fp32, 4 N_t; sharded: 4 N_t / W
    buckets        replicated: b N_t, DDP's copy of the gradients
    gathered       sharded: b times embedding, head and two layers; b + 4 bytes for a gradient of each of these groups
    activations    with checkpointing L T d b, every layer's input, and all that one layer keeps (``layer_bytes``);
                   without, what every layer keeps
    head gradient  4 V d while tiles are summed, b V d to hand it on, b V d for the embedding's where they are tied
    tiles          the divergence's logits: the budget of ``distill.tiles``
    states         b R d_t of the teacher's, and b T (d_s + d_t) where a micro-batch's are joined
    experts        under adapters: peft adds these to a layer's whole stack of experts, which its pass keeps, b each,
                   with checkpointing one layer at a time; and the gradient of one stack
    teacher        its head, b V d_t; in this process, all of it
    reference      the student as a GRPO stage with ``kl_coefficient`` found it, whole in every process: b N
    sampling       keys and values, 2 b L kv_heads head_dim bytes for each of ``sampler_tokens``, of which there are as
                   many as the longest sequence has whatever is set; sharded, the student gathered whole, b N; on a
                   CPU the copy that is decoded faster (``copied_bytes``). A teacher in this process speaks too, with
                   keys and values, and a copy, of its own
    server         where a vLLM speaks for the student (``sampler.backend``) and has no GPU of its own: the least that
                   it works with (``distill.server_memory``), all the time or, if it sleeps, while it samples. A CPU's
                   memory is one, and every process carries its share of it. The student then has no cache here

Training and sampling take turns, so the total is what stays (weights, masters, moments, teacher, reference, server) and
the larger of the two. Sources: the layout of FSDP2 (arXiv 2304.11277, section 3; PyTorch's fully_shard),
mixed-precision training (arXiv 1710.03740), checkpointing (arXiv 1604.06174), activations counted layer by layer as in
arXiv 2205.05198, section 4, for transformers' Qwen3 code, which keeps fp32 copies in its norms. Left out: the
allocator's fragmentation, NCCL's buffers, the CUDA context (together 2 to 4 GB on a GPU; ``RESERVED_BYTES``), and the
decoding passes that a GPU replays, which take less than a hundredth (docs/plan.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.adapters import adapted, adapter_parameters
from distill.config import RunConfig
from distill.errors import UserError
from distill.family import Shape

Engine = Literal["alone", "replicated", "sharded"]
"""One process; every process holds the whole student; every process holds a slice of every tensor."""

GPU_BYTES = 80 * 10**9
"""The GPU that is planned for where none is at hand."""

RESERVED_BYTES = 4 * 10**9
"""Of a GPU: what the formula leaves out."""

TILE_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
"""The budgets of ``distill.tiles``, which this module does not import: it loads without torch."""

CPU_PASS_TOKENS = 1024
"""Most tokens of one pass on a CPU: what a layer makes of so many stays in the cache, and a pass of many more takes a
fifth longer a token."""

COPIED_BYTES = 7 * 10**9
"""Of the largest model whose weights are copied so that a CPU decodes it faster (``distill.packed_linears``): 1.7B, at
6.9 GB in fp32. A larger one's copy might be what does not fit."""

STAYS = ("weights", "masters", "moments", "teacher", "reference", "server")


def pass_tokens(batch_tokens: int, *, on_cpu: bool) -> int:
    """Most tokens of one forward pass of a teacher in this process, under the bound that is set."""
    return min(batch_tokens, CPU_PASS_TOKENS) if on_cpu else batch_tokens


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The peak: what stays, and the larger of a training step and of sampling."""
        return self.stays + max(self.training, self.parts["sampling"])

    @property
    def stays(self) -> int:
        """What is held all the time."""
        return sum(self.parts[name] for name in STAYS)

    @property
    def training(self) -> int:
        """What a training step needs beside that."""
        return sum(value for name, value in self.parts.items() if name not in (*STAYS, "sampling"))


@dataclass(frozen=True, slots=True)
class Load:
    """What a process has to hold besides parameters: tokens of a micro-batch, response tokens of its share of a
    step."""

    micro_batch_tokens: int
    step_tokens: int

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Load:
        """The most that ``config`` allows: every response at its longest."""
        steps = [_longest_step(stage) for stage in config.stages.values()]
        num_responses = max(num for num, _ in steps)
        longest = config.max_prompt_tokens + max(length for _, length in steps)
        share = -(-num_responses // processes)
        budget = config.student.micro_batch_tokens or share * longest
        return cls(
            micro_batch_tokens=min(max(budget, longest), share * longest),
            step_tokens=max(-(-num // processes) * length for num, length in steps),
        )


def _longest_step(stage: object) -> tuple[int, int]:
    """Responses of a step, and the longest one's tokens."""
    from distill.stage_config import OffPolicyStage

    sampling = stage.sampling  # type: ignore[attr-defined]
    length = max(sampling.think.max_new_tokens, sampling.no_think.max_new_tokens)
    if isinstance(stage, OffPolicyStage):
        return stage.batch_size, length
    return stage.prompts_per_step * stage.samples_per_prompt, length  # type: ignore[attr-defined]


def student_memory(
    config: RunConfig,
    student: Shape,
    teacher: Shape,
    *,
    processes: int = 1,
    engine: Engine = "alone",
    device: Literal["cpu", "cuda"] = "cuda",
    load: Load | None = None,
) -> Memory:
    """The formula for one process of a run of ``config``; ``load`` replaces the most that the configuration allows."""
    settings = config.student
    held = load or Load.of(config, processes)
    item = 2 if settings.dtype == "bfloat16" else 4
    total = student.total_parameters
    trained = total if settings.lora is None else adapter_parameters(student, settings.lora)
    cut = processes if engine == "sharded" else 1
    head = student.vocabulary * student.width
    layer = (total - head * (1 if student.tied else 2)) // student.num_layers
    groups = head * (1 if student.tied else 2)
    has_masters = item == 2 and engine != "sharded"
    tokens = held.micro_batch_tokens
    per_layer = tokens * layer_bytes(student, item)
    kept_layers = 1 if settings.gradient_checkpointing else student.num_layers
    inputs = student.num_layers * tokens * student.width * item if settings.gradient_checkpointing else 0
    trains_head = settings.lora is None
    # A GPU's products of 16-bit inputs are fp32, and their gradient goes on in 16 bits.
    row_bytes = 2 * item if device == "cpu" or item == 4 else 2 * 4 + item
    in_process = config.teacher.backend == "local"
    teacher_item = 2 if config.teacher.dtype == "bfloat16" else 4
    cached = max(config.sampler_tokens, longest_sequence(config))
    speaks_here = config.sampler.backend == "transformers"
    server = 0 if speaks_here else _server_beside(config, student, processes, device)
    sampling = item * total if engine == "sharded" else 0
    sampling += cache_bytes(student, item) * cached if speaks_here else server * config.sampler.sleep
    if speaks_here and device == "cpu" and engine != "sharded":
        sampling += copied_bytes(student, item)
    if in_process:
        copy = copied_bytes(teacher, teacher_item) if device == "cpu" else 0
        sampling = max(sampling, cache_bytes(teacher, teacher_item) * cached + copy)
    parts = {
        "weights": (4 if engine == "sharded" else item) * total // cut,
        "masters": 4 * trained if has_masters else 0,
        "moments": (8 if settings.adamw == "fp32" else 2) * trained // cut,
        "gradients": 4 * trained // cut if engine == "sharded" else (item + (4 if has_masters else 0)) * trained,
        "buckets": item * trained if engine == "replicated" else 0,
        "gathered": (2 * item + 4) * groups + (2 * item + item + 4) * layer if engine == "sharded" else 0,
        "activations": inputs + kept_layers * per_layer,
        "head gradient": (4 + item + (item if student.tied else 0)) * head if trains_head else 0,
        "tiles": min(TILE_BYTES[device], tokens * student.vocabulary * row_bytes),
        "states": teacher_item * held.step_tokens * teacher.width + item * tokens * (student.width + teacher.width),
        "experts": item * _adapted_experts(config, student, kept_layers),
        "teacher": teacher_item * (teacher.total_parameters if in_process else teacher.vocabulary * teacher.width),
        "reference": item * total * _has_reference(config),
        "server": server * (not config.sampler.sleep),
        "sampling": sampling,
    }
    if settings.cpu_offload:
        # Slices of weights, gradients and moments live in the machine's memory.
        parts |= {"weights": 0, "moments": 0, "gradients": 0}
    return Memory({name: int(value) for name, value in parts.items()})


def _has_reference(config: RunConfig) -> bool:
    from distill.stage_config import GrpoStage

    return any(isinstance(stage, GrpoStage) and stage.kl_coefficient > 0 for stage in config.stages.values())


def _server_beside(config: RunConfig, student: Shape, processes: int, device: Literal["cpu", "cuda"]) -> int:
    """Bytes of the student's own vLLM that a process has to leave it."""
    from distill.server_memory import least_of_student_server

    if device == "cuda" and config.sampler.devices:
        return 0
    least = least_of_student_server(config, student, on_gpu=device == "cuda")
    return least if device == "cuda" else -(-least // processes)


def _adapted_experts(config: RunConfig, shape: Shape, kept_layers: int) -> int:
    """Numbers in the experts with their adapters, of the layers that keep them, and in the gradient of one stack."""
    lora = config.student.lora
    if lora is None:
        return 0
    names = {path.rpartition(".")[2] for path in adapted(lora, shape) if ".experts." in path}
    if not names:
        return 0
    # Down goes back first, and is gone when gate and up, one stack of twice the size, get their gradient.
    gradient = 1 if "down_proj" in names else 2
    return (kept_layers * len(names) + gradient) * shape.num_experts * shape.width * shape.mlp_width


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest prompt and response together: a cache holds one such at the least."""
    return config.max_prompt_tokens + config.longest_response


def cache_bytes(shape: Shape, item: int) -> int:
    """Of one token's keys and values."""
    return 2 * item * shape.num_layers * shape.num_kv_heads * shape.head_dim


def copied_bytes(shape: Shape, item: int) -> int:
    """Of the copy of a dense model's matrices from which a CPU decodes it; 0 for a model that is too large for one."""
    copied = item * shape.active_parameters
    return copied if not shape.num_experts and copied <= COPIED_BYTES else 0


def layer_bytes(shape: Shape, item: int) -> int:
    """What autograd keeps of one Qwen3 layer for one token; of a mixture, of the experts that it goes to.

    A norm keeps its input in fp32, and its normalised input and its output in the layer's type. So do those of queries
    and keys, whose outputs are rotated. Attention keeps values and, twice, what it says; the MLP gate, its activation,
    up and the product.
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    widest = shape.mlp_width * max(1, shape.experts_per_token)
    norms = 2 * (4 + 2 * item) * shape.width
    attention = (4 + 4 * item) * queries + (4 + 3 * item) * keys
    return norms + attention + 4 * item * widest


@dataclass(frozen=True, slots=True)
class Held:
    """How a student is held, and what one of the processes needs; ``fits`` says whether a GPU has as much."""

    processes: int
    engine: Engine
    memory: Memory
    fits: bool

    def to_json(self) -> dict[str, object]:
        parts = {**self.memory.parts, "total": self.memory.total}
        return {"processes": self.processes, "engine": self.engine, "fits": self.fits, "bytes": parts}

    def lines(self, gpu_bytes: int) -> list[str]:
        """In words, for people."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return [
            f"student: {self.processes} process{'es' if self.processes > 1 else ''}, {self.engine}; "
            f"{self.memory.total / 1e9:.1f} GB each at most, which {verdict} a GPU of {gpu_bytes / 1e9:.0f} GB:",
            *(f"  {name}: {value / 1e9:.2f} GB" for name, value in self.memory.parts.items() if value),
        ]


def hold_student(
    config: RunConfig,
    student: Shape,
    teacher: Shape,
    *,
    gpu_bytes: int = GPU_BYTES,
    processes: int | None = None,
    machines: int = 1,
) -> Held:
    """The fewest GPUs, and how they hold the student, so that the formula fits one; a student that fits whole is not
    cut. ``processes`` fixes their number, and each of ``machines`` has as many. What fits nowhere is held by the most
    that was tried. A student that is offloaded is cut, whatever else is set, as the run cuts it.

    Raises UserError for one process that is to offload."""
    settings = config.student
    # Adapters and 8-bit moments want a student that every process holds whole.
    may_be_sharded = settings.lora is None and settings.adamw == "fp32"
    auto: tuple[Engine, ...] = ("replicated", "sharded") if may_be_sharded else ("replicated",)
    engines = auto if settings.parallel == "auto" else (settings.parallel,)
    counts = [processes] if processes is not None else [machines * 2**power for power in range(8)]
    if settings.cpu_offload:
        engines, counts = ("sharded",), [count for count in counts if count > 1]
        if not counts:
            raise UserError(
                "student.cpu_offload is for students sharded over GPUs, and there is one process; leave it out, or "
                "start more"
            )
    for count in counts:
        for wanted in engines:
            engine: Engine = "alone" if count == 1 else wanted
            memory = student_memory(config, student, teacher, processes=count, engine=engine)
            last = Held(count, engine, memory, memory.total <= gpu_bytes - RESERVED_BYTES)
            if last.fits:
                return last
    return last
