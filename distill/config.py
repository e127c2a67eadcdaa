"""One configuration for the command line, Python, recipes and scheduled jobs.

``RunConfig`` is frozen and strict: an unknown key is an error that names its nearest neighbour. The text under a field
is its documentation. Defaults are the settings that the literature supports at real sizes; the recipes change what
their scale needs. The dump of a run (``config.yaml``) is itself a recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from distill.types import Mode, Sampling

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Settings(BaseModel):
    """Base of every block: frozen, strict, documented by the strings under its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class SamplingSettings(Settings):
    """How a model's responses are drawn in one mode."""

    max_new_tokens: PositiveInt = 4096
    """Longest response, in tokens; a response that reaches it is truncated."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k most probable tokens; 0 keeps all."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token the response already holds."""
    thinking_budget: PositiveInt | None = None
    """Response tokens after which an open thinking block is closed by the early-stop string; null never forces."""

    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump())


class ModeSampling(Settings):
    """Sampling for each mode."""

    think: SamplingSettings = SamplingSettings()
    no_think: SamplingSettings = SamplingSettings()

    def of(self, mode: Mode) -> Sampling:
        return (self.think if mode == "think" else self.no_think).sampling()


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
    """Most tokens in one scoring forward pass; under way at once to each vLLM server."""


class LoraSettings(Settings):
    """Low-rank adapters instead of full fine-tuning (peft); merged into the weights on export."""

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


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


class SamplerSettings(Settings):
    """Who draws the student's responses."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """``transformers``: the trained model itself, in this process. ``vllm``: a vLLM server of the run's own, which gets
    the student's weights before it speaks, and is checked to have got them."""
    sync: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How the weights get to the server. ``file``: through memory or disk, for a server on a CPU. ``nccl``: to a server
    with ``devices`` of its own. ``ipc``: within the GPU that trainer and server share. Auto takes the one that fits."""
    devices: tuple[str, ...] = ()
    """GPUs of the server's own, by number, or CPU cores; empty leaves the choice to vLLM, which on a GPU is the
    trainer's."""
    tolerance: PositiveFloat | None = None
    """The largest difference in log-probability of a probe's token between server and trainer, beyond which the run
    stops. Null means 1e-4 for float32 and 0.25 for bfloat16."""
    server_args: tuple[str, ...] = ()
    """Further arguments of the server, as vLLM takes them."""
    patience_seconds: PositiveFloat = 600.0
    """How long a server that does not answer is waited for; then the run stops with exit code 75."""


class EmbeddedPrompts(Settings):
    """Fresh questions of the embedded arithmetic task."""

    kind: Literal["embedded"] = "embedded"
    max_operations: Annotated[int, Field(ge=1, le=8)] = 8
    """Difficulty: the longest chain of operations."""


class FilePrompts(Settings):
    """Prompts from a local JSONL or parquet file, or a folder of such files."""

    kind: Literal["file"] = "file"
    path: str
    prompt_column: str = "prompt"
    """The column that holds the prompt, as text or as a list of messages."""
    answer_column: str = "answer"
    """The column that holds the reference for grading, if there is one."""


class HubSet(Settings):
    """One data set on the Hugging Face hub."""

    id: str
    revision: str
    """A commit, so that the same recipe reads the same data next year."""
    licence: str
    """Shown before the download; yours to check against your use."""
    split: str = "train"
    subset: str | None = None
    prompt_column: str = "prompt"
    answer_column: str | None = None
    language_column: str | None = None
    mode_column: str | None = None
    """think, no_think or null, for each prompt."""
    domain_column: str | None = None
    domain: str | None = None
    """Recorded with every prompt of the set that ``domain_column`` names none for."""
    usual_columns: bool = False
    """Use the columns answer, mode, language and domain where the set has them, as ``--prompts`` does."""
    limit: PositiveInt | None = None
    """The first rows that are used; null uses all."""


class HubPrompts(Settings):
    """Prompts from sets on the hub, downloaded on first use, shuffled together by the run's seed."""

    kind: Literal["hub"] = "hub"
    sets: Annotated[tuple[HubSet, ...], Field(min_length=1)]


PromptSettings = Annotated[EmbeddedPrompts | FilePrompts | HubPrompts, Field(discriminator="kind")]


class Optimiser(Settings):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero along a cosine at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    max_grad_norm: PositiveFloat = 1.0


class Mixture(Settings):
    """Which modes a stage works in, and how a mode is asked for."""

    think_share: Share = 0.5
    """Share of prompts in thinking mode, among those that leave the choice to the stage."""
    soft_switch_share: Share = 0.1
    """Share of prompts whose mode is asked for by a flag in the last user message (/think, /no_think)."""


class FilterSettings(Settings):
    """Which of the teacher's responses are not trained on. A prompt with several samples keeps those that are left."""

    truncated: bool = True
    """Leave out responses that reached the token limit."""
    unclosed: bool = False
    """Leave out responses whose thinking is not closed: they end without an answer."""
    max_repetition: Share | None = None
    """Leave out responses of which a larger share of 4-grams repeats earlier ones; null leaves out none. What a
    teacher's responses have is in ``distill responses stats``."""
    wrong: bool = False
    """Leave out responses that do not give their prompt's answer, among prompts that have one."""


class OffPolicyStage(Settings):
    """Cross-entropy on the teacher's responses in both modes (Qwen3 report, section 4.5, first stage)."""

    kind: Literal["off_policy"] = "off_policy"
    num_prompts: PositiveInt = 20000
    """Questions the teacher answers; a question is asked in one mode."""
    samples_per_prompt: PositiveInt = 1
    epochs: PositiveInt = 2
    batch_size: PositiveInt = 64
    """Responses in an optimiser step."""
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling(
        think=SamplingSettings(max_new_tokens=16384, temperature=0.6, top_p=0.95, top_k=20),
        no_think=SamplingSettings(max_new_tokens=4096, temperature=0.7, top_p=0.8, top_k=20),
    )
    filters: FilterSettings = FilterSettings()
    optimiser: Optimiser = Optimiser(learning_rate=1e-5, schedule="cosine")


class DivergenceSettings(Settings):
    """What on-policy distillation minimises at every response token."""

    kind: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Mixture weight of the Jensen-Shannon and the skewed divergences."""
    temperature: PositiveFloat = 1.0
    estimator: Literal["k1", "k3"] = "k1"
    """How the reverse KL is estimated where the teacher's signal is the sampled token: as log p - log q, or as
    q/p - 1 - log q/p, which is never negative. The gradient is the same."""
    merge_stop_ids: bool = True
    """Treat the family's stop tokens as one action; apart, a base student and its teacher disagree on which one ends
    a response and its length explodes."""


class OnPolicyStage(Settings):
    """The student speaks, the teacher judges every token (Qwen3 report, section 4.5, second stage)."""

    kind: Literal["on_policy"] = "on_policy"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: PositiveInt = 4
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    divergence: DivergenceSettings = DivergenceSettings()
    optimiser: Optimiser = Optimiser(learning_rate=2e-6)


class PolicyGradientSettings(Settings):
    """How a verifier's verdicts move the student: GRPO's advantages (arXiv 2402.03300) with DAPO's corrections."""

    grader: str | None = None
    """Who decides whether a response is right: number, words, math, choice, exact, embedded. Null chooses by the
    prompts: the strictest grader that all their answers suit."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: PositiveFloat = 0.28
    """How far a token's probability may move, down and up, within one sampled batch before it stops teaching."""
    updates_per_step: PositiveInt = 1
    """Optimiser steps on each sampled batch, each on its share of the groups. Clipping means something from 2 on."""
    overlong_share: Share = 0.2
    """The last share of the token limit, in which the reward falls evenly by up to 1 (DAPO); 0 punishes nothing."""
    dr_grpo: bool = False
    """Dr. GRPO (arXiv 2503.20783): advantages keep the scale of the reward, and a token counts one over the token limit
    of all responses instead of one over the tokens that there are."""
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """A token weighs p(trainer) / p(sampler), at most this much: 1 where the two agree."""


class GrpoStage(Settings):
    """The student speaks, a verifier judges the response: the reinforcement-learning baseline."""

    kind: Literal["grpo"] = "grpo"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Size of a group: the responses to one prompt, which are compared with each other."""
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the reverse KL to the student as the stage found it; 0 keeps no copy of that one."""
    optimiser: Optimiser = Optimiser(learning_rate=1e-6)


class OpdRewardStage(Settings):
    """On-policy distillation and reinforcement learning in one loss: the teacher judges every token, a verifier the
    response."""

    kind: Literal["opd_reward"] = "opd_reward"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    divergence: DivergenceSettings = DivergenceSettings()
    divergence_coefficient: PositiveFloat = 1.0
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    reward_coefficient: PositiveFloat = 1.0
    optimiser: Optimiser = Optimiser(learning_rate=2e-6)


StageSettings = Annotated[OffPolicyStage | OnPolicyStage | GrpoStage | OpdRewardStage, Field(discriminator="kind")]


class CurveSettings(Settings):
    """Examinations between the steps of a stage: its learning curve, and what may end it early (``stop``)."""

    every: PositiveInt = 20
    """Optimiser steps from one examination to the next; the weights a stage starts from are examined too."""
    task: str | None = None
    """A task whose questions no final score uses; null takes test questions of the embedded task that no
    task of ``evaluation.tasks`` asks."""
    num_questions: PositiveInt = 256
    samples: PositiveInt = 1
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("think",)
    """The first one's score is what ``stop`` and ``keep_best`` look at."""
    keep_best: bool = False
    """A stage ends with the weights that scored best, the earliest of equals, instead of its last ones."""


class StopSettings(Settings):
    """Ends a stage before its last step, at the first examination that finds either reached."""

    score: Share | None = None
    flops: PositiveFloat | None = None
    """FLOPs of the stage, all roles together."""


class PassAtSettings(Settings):
    """How often one of k responses is right, from many responses to few questions (unbiased pass@k)."""

    k: PositiveInt = 64
    samples: PositiveInt = 128
    num_questions: PositiveInt = 100
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("think",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.samples < self.k:
            raise ValueError(f"pass@{self.k} needs at least {self.k} samples a question, and samples is {self.samples}")
        return self


class ModeText(Settings):
    """A text for each mode; null keeps the task's own."""

    think: str | None = None
    no_think: str | None = None


class TaskSettings(Settings):
    """A task with settings of its own; one without any is written as its name alone.

    One's own questions are two lines: ``path: my.jsonl`` and ``grader: math``.
    """

    name: str | None = None
    """A known task; null where ``path`` holds questions of one's own."""
    path: str | None = None
    """JSONL or parquet, or a folder of such files: one's own questions, or with ``name`` a local copy of that set, with
    the columns it has on the hub (CSV too)."""
    grader: str | None = None
    """How responses are graded; null takes the task's own, or the strictest grader that suits all of one's answers."""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    instruction: ModeText = ModeText()
    """What every question ends with, by mode."""
    num_questions: PositiveInt | None = None
    """The first questions that are asked; null takes the whole examination's number."""
    samples: PositiveInt | None = None
    """Responses to each question; null takes the whole examination's number."""
    pass_at: tuple[PositiveInt, ...] = ()
    """Each k for which pass@k is estimated; empty means k = the number of samples."""
    modes: tuple[Mode, ...] | None = None
    """The modes in which it is asked; null takes the whole examination's."""
    label: str | None = None
    """What results call it; null takes the name, or the file's. Two examinations on one task need two labels."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.name is None and self.path is None:
            raise ValueError("a task needs a name or a path")
        return self


def _kind_of_task(value: object) -> str:
    return "name" if isinstance(value, str) else "TaskSettings"


AnyTask = Annotated[
    Annotated[str, Tag("name")] | Annotated[TaskSettings, Tag("TaskSettings")], Discriminator(_kind_of_task)
]


class EvaluationSettings(Settings):
    """How every checkpoint is examined. The sampling is the report's, mode by mode (section 4.6).

    The report allows 32,768 tokens a response; the base models' positions end at 32,768, prompt included.
    """

    tasks: tuple[AnyTask, ...] | None = None
    """Names of tasks, or tasks with settings of their own. ``prompts`` is the held-out part of one's own prompts that
    have an answer, ``mode_switching`` whether the mode follows flags through a conversation. Null examines on the
    prompts' own kind: the embedded task, one's own answered prompts, or gsm8k where there are none."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("think", "no_think")
    num_questions: PositiveInt | None = None
    """The first questions of a task; null takes all."""
    samples: PositiveInt | None = None
    """Responses to each question; null takes the task's own number (64 for AIME, as in the report, else 1)."""
    references: bool = True
    """Examine the teacher and the start too; without them there is no gap to close."""
    pass_at: PassAtSettings | None = None
    curve: CurveSettings | None = None
    """Null examines the checkpoints at the stages' ends only."""
    budgets: tuple[PositiveInt, ...] = ()
    """Thinking budgets, in response tokens, at which every checkpoint is examined besides."""
    sampling: ModeSampling = ModeSampling(
        think=SamplingSettings(max_new_tokens=30720, temperature=0.6, top_p=0.95, top_k=20),
        no_think=SamplingSettings(max_new_tokens=30720, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    )


class GuardLimits(Settings):
    """Where a guard warns, and where it stops a run that it has warned of."""

    warn: float
    stop: float


class GuardSettings(Settings):
    """When a training that goes wrong is stopped. Null switches a guard off. All but ``kl`` compare the last steps
    with the stage's own, by mode."""

    window: PositiveInt = 5
    """Steps over which a metric is averaged before it is judged."""
    length: GuardLimits | None = GuardLimits(warn=2.0, stop=4.0)
    """Mean response length over that of the stage's first steps."""
    repetition: GuardLimits | None = GuardLimits(warn=0.2, stop=0.4)
    """Share of 4-grams that a response had said before, above its lowest."""
    truncation: GuardLimits | None = GuardLimits(warn=0.2, stop=0.5)
    """Share of responses that reached the token limit, above its lowest."""
    closure: GuardLimits | None = GuardLimits(warn=0.2, stop=0.5)
    """Share of responses with closed thinking, below its highest."""
    entropy: GuardLimits | None = GuardLimits(warn=0.02, stop=0.005)
    """The student's entropy over that of the stage's first steps."""
    kl: GuardLimits | None = GuardLimits(warn=1e-4, stop=1e-5)
    """Reverse KL to the teacher, nats a token. Rounding to 16 bits alone makes 5e-6 of a model to itself."""

    def limits(self, guard: str) -> GuardLimits | None:
        found = dict(self)[guard]
        assert found is None or isinstance(found, GuardLimits)
        return found


class PreflightSettings(Settings):
    """What is checked before the first gradient; the manifest holds what each check found."""

    skip: tuple[str, ...] = ()
    """Checks that are not made, by their names (--skip-preflight)."""
    same_weights: bool = False
    """Let a model be distilled into itself: its teacher may hold the student's own weights."""


class RunConfig(Settings):
    """Everything a run depends on besides the code and the data."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Also the run directory's name where ``--out`` is not given; null becomes TEACHER-to-STUDENT."""
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: TeacherSettings = TeacherSettings()
    specialists: dict[str, TeacherSettings] = {}
    """Teachers for the prompts of one domain (a prompt's ``domain``); ``teacher`` teaches all others. The
    student is the same."""
    student: StudentSettings = StudentSettings()
    prompts: PromptSettings = EmbeddedPrompts()
    first_prompt: Annotated[int, Field(ge=0)] = 0
    """Position among the prompts at which the first stage begins: where the run stopped that trained this student."""
    stages: dict[str, StageSettings] = {"off_policy": OffPolicyStage(), "on_policy": OnPolicyStage()}
    """The stages by name, in the order in which they run; each one starts from the student the last one left."""
    stop: dict[str, StopSettings] = {}
    """Stages, by name, that may end early; looked at where ``evaluation.curve`` examines."""
    evaluation: EvaluationSettings = EvaluationSettings()
    guards: GuardSettings = GuardSettings()
    preflight: PreflightSettings = PreflightSettings()
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is refused, with the line it came from."""
    sampler: SamplerSettings = SamplerSettings()
    sampler_batch: PositiveInt = 256
    """Most responses that are decoded together."""
    sampler_tokens: PositiveInt = 131072
    """Most tokens in the sampler's cache, each response counted at its limit; where responses may get long, fewer are
    decoded together."""
    checkpoint_every: PositiveInt = 25
    """Optimiser steps between two checkpoints."""
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = None
    """Where the metrics of every step and the scores are shown besides the run directory; the library of this name has
    to be installed. Null shows them nowhere else."""
    store: str | None = None
    """Folder of the teacher-response store; null takes DISTILL_STORE or a folder under the user's cache."""

    @property
    def longest_response(self) -> int:
        """Most tokens that any part of the run lets a model say."""
        blocks = [self.evaluation.sampling, *(stage.sampling for stage in self.stages.values())]
        return max(sampling.max_new_tokens for block in blocks for sampling in (block.think, block.no_think))

    @model_validator(mode="after")
    def _check_signal(self) -> Self:
        """What a signal cannot give is refused before anything is spent."""
        signal = self.teacher.signal
        for name, stage in self.stages.items():
            if isinstance(stage, OpdRewardStage) and signal != "hidden":
                raise ValueError(f"stages.{name} (opd_reward) needs teacher.signal=hidden, and it is {signal}")
            if not isinstance(stage, OnPolicyStage):
                continue
            where, divergence = f"stages.{name}.divergence", stage.divergence
            if signal != "hidden" and divergence.temperature != 1:
                raise ValueError(
                    f"{where}.temperature is {divergence.temperature}, and teacher.signal={signal} holds probabilities "
                    f"at temperature 1; set it to 1, or teacher.signal to hidden"
                )
            if signal != "sampled" and divergence.estimator != "k1":
                raise ValueError(
                    f"{where}.estimator is for teacher.signal=sampled; with {signal} nothing is estimated: leave it out"
                )
            if signal == "sampled":
                _check_sampled(where, name, stage)
        return self

    @model_validator(mode="after")
    def _check_specialists(self) -> Self:
        for domain, settings in self.specialists.items():
            if "model" not in settings.model_fields_set:
                raise ValueError(f"specialists.{domain} names no model; set specialists.{domain}.model")
            if (settings.signal, settings.top_k) != (self.teacher.signal, self.teacher.top_k):
                raise ValueError(
                    f"specialists.{domain} has signal {settings.signal} and top_k {settings.top_k}, and teacher has "
                    f"{self.teacher.signal} and {self.teacher.top_k}; one loss feels them all: set them to the same"
                )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if not self.stages:
            raise ValueError("stages is empty; name at least one stage, for example off_policy")
        reserved = {"teacher", "start"} & set(self.stages)
        if reserved:
            raise ValueError(f"a stage may not be called {sorted(reserved)[0]!r}: reports use that name")
        unknown = sorted(set(self.stop) - set(self.stages))
        if unknown:
            raise ValueError(f"stop names the stage {unknown[0]!r}; the stages are {', '.join(self.stages)}")
        if self.stop and self.evaluation.curve is None:
            raise ValueError("stop needs evaluation.curve: only an examination can find a score reached")
        return self


def _check_sampled(where: str, name: str, stage: OnPolicyStage) -> None:
    """The sampled token stands for the distribution it was drawn from: the student's own, stop tokens apart."""
    if stage.divergence.kind != "reverse_kl":
        raise ValueError(
            f"{where}.kind is {stage.divergence.kind}, and teacher.signal=sampled estimates the reverse_kl alone; set "
            f"it to reverse_kl, or teacher.signal to hidden"
        )
    if stage.divergence.merge_stop_ids:
        raise ValueError(
            f"{where}.merge_stop_ids is true, and teacher.signal=sampled does not tell the probability of the other "
            f"stop token; set it to false where the student has learnt to end as its teacher does, or teacher.signal "
            f"to hidden"
        )
    for mode, sampling in (("think", stage.sampling.think), ("no_think", stage.sampling.no_think)):
        if (sampling.temperature, sampling.top_p, sampling.top_k, sampling.presence_penalty) != (1, 1, 0, 0):
            raise ValueError(
                f"stages.{name}.sampling.{mode} changes the student's distribution, and teacher.signal=sampled takes "
                f"tokens that were drawn from it as it is; set temperature and top_p to 1, top_k and presence_penalty "
                f"to 0, or teacher.signal to hidden"
            )
