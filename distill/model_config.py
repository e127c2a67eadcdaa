"""Settings of the teacher, the student, and who samples the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distill.errors import UserError
from distill.settings import PositiveFloat, PositiveInt, Settings

ServerUrl = Annotated[str, Field(pattern=r"^https?://[^/]+")]


class TeacherUrls(Settings):
    """vLLM servers that somebody else runs, for each role; ``distill teacher serve`` starts such servers. Several are
    replicas that share the work. A role without a URL gets a server that the run starts and ends itself. An API key is
    read from DISTILL_TEACHER_API_KEY."""

    generate: tuple[ServerUrl, ...] = ()
    """Where the teacher speaks: responses for the off-policy stage and its examination."""
    score: tuple[ServerUrl, ...] = ()
    """Where the teacher judges, in the on-policy stage: servers that were started to score where ``signal`` is hidden,
    to generate where it is another; for those, the ones of ``generate`` do as well."""


_CUTS = ("tensor_parallel", "pipeline_parallel", "replicas")
_OF_SERVERS = ("wire", "quantization", "server_args", "patience_seconds")
"""What else vLLM servers of a teacher are for, besides ``urls``."""


def _written(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


class TeacherSettings(Settings):
    """The model that is distilled."""

    model: str = "235B"
    """A size name (235B, 32B, ...), an embedded name (tiny), a hub id or a local directory."""
    revision: str | None = None
    """Hub revision; null takes the hub's default branch. The resolved commit is recorded."""
    backend: Literal["local", "vllm"] = "local"
    """``local``: in this process, through transformers. ``vllm``: behind vLLM servers, the run's own or ``urls``."""
    urls: TeacherUrls = TeacherUrls()
    signal: Literal["hidden", "topk", "sampled", "chosen"] = "hidden"
    """What the teacher says of every response token. ``hidden``: its whole distribution. ``topk``: its ``top_k`` most
    probable tokens and the mass of all others. ``sampled``: the log-probability of the sampled token. ``chosen``: those
    of ``top_k`` tokens that the student holds most probable, and the mass of all others (vLLM on a GPU)."""
    top_k: PositiveInt = 20
    """Tokens in the signals topk and chosen; more than 20 takes a server that was started with --max-logprobs."""
    wire: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Number type in which hidden states travel from a vLLM server. fp8 halves the bytes of bf16 and is lossy."""
    tensor_parallel: PositiveInt = 1
    """GPUs that each layer of each of the run's own vLLM servers is cut over."""
    pipeline_parallel: PositiveInt = 1
    """Groups of layers, one after the other on further GPUs, that each of the run's own vLLM servers is cut into."""
    replicas: PositiveInt = 1
    """The run's own vLLM servers of a role, side by side; each takes tensor_parallel times pipeline_parallel GPUs."""
    quantization: str | None = None
    """How the run's own vLLM servers quantise the weights as they load them (vLLM's name, for example fp8). It is
    another teacher then, a little: null serves the checkpoint as it is."""
    server_args: tuple[str, ...] = ()
    """Further arguments of the run's own vLLM servers, as vLLM takes them."""
    patience_seconds: PositiveFloat = 600.0
    """How long a vLLM server that does not answer is waited for; then the run stops with exit code 75."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_tokens: PositiveInt = 65536
    """Most tokens in one scoring forward pass, on a CPU no more than 1,024; under way at once to each vLLM server."""

    @model_validator(mode="after")
    def _check_cuts(self) -> Self:
        """A plan may put the teacher behind vLLM whatever ``backend`` says, and reads all else of this block then; how
        its servers are cut it finds itself. A run refuses the rest (``check_read``)."""
        for name in self.cuts_without_servers:
            raise ValueError(
                f"{name} is for the run's own vLLM servers, and backend={self.backend} has none; set backend to vllm, "
                f"or {name} to {type(self).model_fields[name].default} (a plan finds the cuts of its servers itself)"
            )
        return self

    @property
    def cuts_without_servers(self) -> list[str]:
        """The settings of servers' cuts that nobody reads, since there are no servers."""
        return [name for name in self.unread_settings if name in _CUTS]

    @property
    def unread_settings(self) -> dict[str, Any]:
        """The settings, by name, that a run does not read, since its teacher is behind no servers."""
        if self.backend == "vllm":
            return {}
        own = {name: value for name, value in self if name in (*_CUTS, *_OF_SERVERS)}
        own |= {f"urls.{role}": urls for role, urls in self.urls}
        return {name: value for name, value in own.items() if value != self.default_of(name)}

    @classmethod
    def default_of(cls, name: str) -> Any:
        """Of a setting that ``unread_settings`` may name."""
        return () if name.startswith("urls.") else cls.model_fields[name].default

    def check_read(self, where: str) -> None:
        """Raises UserError where a run would pass over something that is set; ``where`` is the block's name."""
        for name, value in self.unread_settings.items():
            raise UserError(
                f"{where}.{name} is {_written(value)}, and {where}.backend=local has no vLLM servers that it is for; "
                f"set {where}.backend to vllm, or leave {where}.{name} out"
            )


class LoraSettings(Settings):
    """Low-rank adapters instead of full fine-tuning (peft); merged into the weights on export."""

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of layers, or ends of their paths. All-linear: every linear layer but the head; of a mixture of experts
    the router and the experts too."""


class StudentSettings(Settings):
    """The model that is trained."""

    model: str = "4B"
    """A size name (4B means Qwen/Qwen3-4B-Base), an embedded name (nano, nano-moe), a hub id or a local directory."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraSettings | None = None
    """Null trains every weight."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: PositiveInt | None = 32768
    """Most tokens in one forward-backward pass; sequences are packed without padding, and gradients accumulate over a
    step's passes. Null trains a step in one pass."""
    parallel: Literal["auto", "replicated", "sharded"] = "auto"
    """How several processes hold the student: each one whole (DDP), or each one a slice (FSDP2). Auto replicates what
    fits into a GPU by the memory formula."""
    adamw: Literal["fp32", "8bit"] = "fp32"
    """Number type of the optimiser's moments; 8bit needs an NVIDIA GPU, bitsandbytes and a student that is whole."""
    cpu_offload: bool = False
    """Keep masters, gradients and moments in the machine's memory and step there; shards the student."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        """What wants a student that is whole is refused beside what cuts it, and not overruled."""
        whole = (
            ("parallel=replicated", self.parallel == "replicated", "set student.parallel to auto"),
            ("lora", self.lora is not None, "leave student.lora out"),
            ("adamw=8bit", self.adamw == "8bit", "set student.adamw to fp32"),
        )
        for name, is_set, instead in whole if self.cpu_offload else ():
            if is_set:
                raise ValueError(
                    f"cpu_offload is for a student that is cut into slices, and student.{name} for one that every "
                    f"process holds whole; {instead}, or leave student.cpu_offload out"
                )
        return self


class SamplerSettings(Settings):
    """Who draws the student's responses."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """``transformers``: the trained model itself, in this process. ``vllm``: a vLLM of the run's own, which gets the
    student's weights before it speaks, and is checked to have got them."""
    place: Literal["server", "in_process"] = "server"
    """Where ``backend`` vllm runs. ``server``: in processes of its own. ``in_process``: in the trainer's, on its cores
    or its GPU; weights are handed over as they lie in memory."""
    sync: Literal["auto", "file", "nccl", "ipc", "adapter"] = "auto"
    """How the weights get to the server. ``file``: through memory or disk, for a server on a CPU. ``nccl``: to a server
    with ``devices`` of its own. ``ipc``: within the GPU that trainer and server share. ``adapter``: LoRA adapters by
    themselves, which the server lays over the weights that it started with. Auto takes the one that fits: adapter for a
    LoRA student on a GPU that vLLM can serve so. In the trainer's process there is nothing to choose."""
    sleep: bool = False
    """Whether vLLM on the trainer's GPU gives its memory away while the student trains."""
    devices: tuple[str, ...] = ()
    """GPUs of the server's own, by number, or CPU cores; empty leaves the choice to vLLM, which on a GPU is the
    trainer's."""
    staleness: Literal[0, 1] = 0
    """Steps between the weights that speak and those that learn from it. 0: a batch is sampled when it is
    trained on. 1: the next batch is sampled while this one trains; the server has weights of its own, so it takes
    ``backend`` vllm."""
    tolerance: PositiveFloat | None = None
    """The largest difference in log-probability of a probe's token between server and trainer, beyond which the run
    stops. Null means 1e-4 for float32 and 0.25 for bfloat16."""
    server_args: tuple[str, ...] = ()
    """Further arguments of the server, or of the engine in this process, as vLLM takes them."""
    patience_seconds: PositiveFloat = 600.0
    """How long a server that does not answer is waited for; then the run stops with exit code 75. Of several processes
    those that did not start it wait for 20 s at most."""

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        """What only vLLM reads is refused where the trained model speaks; of staleness the whole configuration says
        more."""
        if self.backend == "vllm":
            return self
        others = {"backend", "staleness"}
        for name, value in self:
            if name not in others and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"sampler.{name} is for vLLM, and sampler.backend={self.backend} does not read it; set "
                    f"sampler.backend=vllm, or leave sampler.{name} out"
                )
        return self

    @property
    def confines(self) -> str | None:
        """The setting that confines a run to one process, as ``name=value``; None where none does."""
        if self.backend == "vllm" and self.place == "in_process":
            return "sampler.place=in_process"
        if self.staleness:
            return f"sampler.staleness={self.staleness}"
        return "sampler.sleep=true" if self.backend == "vllm" and self.sleep else None

    def check_processes(self, num: int) -> None:
        """Raises UserError where a run of ``num`` processes cannot be sampled so."""
        if num > 1 and self.confines is not None:
            raise UserError(f"{self.confines} is for one process, and there are {num}; set it to its default")
