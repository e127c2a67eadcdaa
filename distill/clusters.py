"""What a cluster has to be told beside the run: the block ``launch`` of a job file.

``distill launch`` reads it; a worker passes over it. What the run is, its recipe says, when it runs its schedule, and
how many GPUs it takes its plan; here is only what nobody else can know: where things are, what they are called, who
pays. Nothing has a guessed value: what an engine needs and finds missing is a sentence.

Left out on purpose: secrets. A setting names the file or the secret that holds one, never what it holds.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from distill.settings import PositiveFloat, Settings

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("it has to be one line of printable text")
    return text


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("it is no full path; begin it with /")
    return path


def _minutes(time: object) -> object:
    """A bare 60 is a number to YAML, and minutes to sbatch."""
    return str(time) if isinstance(time, int) and not isinstance(time, bool) else time


Line = Annotated[str, AfterValidator(_one_line)]
FullPath = Annotated[Line, AfterValidator(_absolute)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:+/@=&|!*()\[\]-]+$")]
"""What is a name to a cluster: no spaces and nothing that a shell reads."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""A name of Kubernetes' (an RFC 1123 label)."""


class SlurmSettings(Settings):
    """For ``--on slurm``. The texts name sbatch's own options."""

    time: Annotated[str, BeforeValidator(_minutes), Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] | None = None
    """Wall time of an attempt as sbatch takes it: 24:00:00, 2-12, or 90 for minutes (``--time``); needed.
    Before its end the run is asked to stop and is queued again."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gres: Word = "gpu"
    """The GPU resource's name, with its type where the cluster wants one: gpu:h100 (``--gres``)."""
    exclusive: bool = False
    """Whole machines, whatever the job uses of them (``--exclusive``)."""
    secret_files: dict[Variable, FullPath] = Field(default_factory=dict)
    """Environment variables whose values are read on the cluster, each from a file of its own there."""


class Volume(Settings):
    """A persistent volume claim and where it is mounted."""

    claim: Name
    path: FullPath


class SecretKey(Settings):
    """One key of a Kubernetes Secret."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


class KubernetesSettings(Settings):
    """For ``--on kubernetes``. ``launch.image`` is needed too."""

    namespace: Name | None = None
    """Needed."""
    queue: Name | None = None
    """Kueue's local queue (label ``kueue.x-k8s.io/queue-name``); the job then begins suspended, and Kueue starts it."""
    volumes: tuple[Volume, ...] = ()
    """``launch.out`` has to lie in one of them, or checkpoints are lost with the pod."""
    secrets: dict[Variable, SecretKey] = Field(default_factory=dict)
    """Environment variables and the secrets that hold them (``secretKeyRef``)."""
    node_selector: dict[Line, str] = Field(default_factory=dict)
    """Labels of the machines, for example their kind of GPU (``nodeSelector``)."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """As Kubernetes takes them."""
    gpu_resource: Word = "nvidia.com/gpu"
    service_account: Name | None = None
    priority_class: Name | None = None
    image_pull_secrets: tuple[Name, ...] = ()
    shared_memory_gb: PositiveFloat = 16.0
    """Size of /dev/shm, which processes on one machine speak through; it counts as the pod's memory."""


class SkypilotSettings(Settings):
    """For ``--on skypilot``."""

    infra: Word | None = None
    """Where: aws, gcp/us-central1, k8s/my-context, ...; null leaves the choice to SkyPilot."""
    use_spot: bool = False
    disk_size: PositiveInt | None = None
    """GB of a machine's own disk."""
    volumes: dict[FullPath, Word] = Field(default_factory=dict)
    """Paths and the SkyPilot volumes that are mounted there."""
    file_mounts: dict[FullPath, Line] = Field(default_factory=dict)
    """Paths and what is put there: a local path, or a bucket such as s3://name."""
    secrets: tuple[Variable, ...] = ()
    """Environment variables whose values SkyPilot takes from the environment that the job is submitted from."""


class LaunchSettings(Settings):
    """Where and as whom a job runs on a cluster. ``--set launch.slurm.partition=gpu`` sets one of them."""

    gpus: Line | None = None
    """What there is, as ``distill plan --gpus`` takes it: 8xH200, or 2x8xH100 for two machines of eight. This, or the
    two below, are needed; the plan says how many of them are used."""
    gpus_teacher: Line | None = None
    gpus_student: Line | None = None
    out: FullPath | None = None
    """The folder on the cluster in which run directories are made, which every machine sees and no end of a job
    removes; needed."""
    workdir: FullPath | None = None
    """Where the command begins on the cluster; null is wherever the engine begins."""
    setup: tuple[Line, ...] = ()
    """Lines of shell before the command, such as ``source /venv/bin/activate``. They are taken as they are written."""
    environment: dict[Variable, Line] = Field(default_factory=dict)
    """Environment variables. Secrets have settings of their own."""
    image: Word | None = None
    """The container image that has this toolkit, and vLLM where the teacher is served."""
    cpus_per_gpu: PositiveInt | None = None
    """Processor cores for each GPU (for each process, on machines without)."""
    memory_gb_per_gpu: PositiveInt | None = None
    teacher_start_seconds: PositiveFloat = 3600.0
    """What a teacher's servers get to load their weights."""
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    skypilot: SkypilotSettings = SkypilotSettings()

    @model_validator(mode="after")
    def _check_secrets(self) -> Self:
        for name in self.environment:
            if _SECRET.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret, which has no place in a file; name where it is held: "
                    "slurm.secret_files, kubernetes.secrets or skypilot.secrets"
                )
        return self
