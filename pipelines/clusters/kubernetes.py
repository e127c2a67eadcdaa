"""A job as Kubernetes takes it: a Job, or a CronJob where the schedule has a cron.

    ConfigMap   the recipe and the parts' scripts
    Service     without an address of its own, for several machines: so that they find each other by name
    Job         a pod for each of the student's machines; of one machine, the teacher's servers are its sidecars

The exit codes are the pod failure policy's: 2 fails the Job, 75 and a pod that the cluster takes away (a drained
machine, a preemption) are replaced and count for nothing, all others count towards ``backoffLimit``.

Left out on purpose: a teacher on machines of its own. A Job has no word for services that end with it; such servers
are started apart and named in ``teacher.urls``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from distill.errors import UserError
from pipelines.clusters.documents import dump
from pipelines.clusters.fleet import STUDENT_PORT, Fleet, Part, Server, lies_in
from pipelines.clusters.shell import Read, joined, line, opening

_SCRIPTS = "/etc/distill"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")
"""Of a CronJob, which appends eleven characters to name its Jobs; a Job is kept to it too."""
_KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_JOB_NAME = "batch.kubernetes.io/job-name"
_PROBE_SECONDS = 5

Object = dict[str, Any]


def render(fleet: Fleet) -> str:
    """The objects as one YAML file. Raises UserError for settings that are missing or beyond Kubernetes' words."""
    _refuse(fleet)
    job = _job(fleet)
    schedule = fleet.schedule
    objects = [_config_map(fleet)]
    if fleet.student.machines > 1:
        objects.append(_service(fleet))
    if schedule.cron is None:
        objects.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(fleet, queue=True), "spec": job})
    else:
        deadline = schedule.starting_deadline_seconds
        spec = {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": schedule.concurrency_policy.capitalize(),
            **({} if deadline is None else {"startingDeadlineSeconds": deadline}),
            "jobTemplate": {"metadata": {"labels": _labels(fleet, queue=True)}, "spec": job},
        }
        metadata = _metadata(fleet, queue=False)
        objects.append({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec})
    begin = f"# {fleet.name}: made by `distill launch --on kubernetes`; change the job file, not this.\n"
    return begin + "".join(f"---\n{dump(one)}" for one in objects)


def _refuse(fleet: Fleet) -> None:
    if not _NAME.fullmatch(fleet.name):
        raise UserError(
            f"{fleet.name!r} is no name on Kubernetes: 52 lower-case letters, digits and '-' at most, a letter or "
            "digit first and last; give one with --name"
        )
    out = fleet.needed("out", "Kubernetes", example="/data/runs")
    volumes = fleet.settings.kubernetes.volumes
    if not any(lies_in(out, volume.path) for volume in volumes):
        mounted = ", ".join(volume.path for volume in volumes) or "none"
        raise UserError(
            f"launch.out is {out}, which lies in no volume, so that checkpoints would be lost with the pod; mounted: "
            f"{mounted}; add it to launch.kubernetes.volumes, with its claim and its path"
        )
    machines = [part for part in fleet.servers if part.machines > 1]
    room = fleet.plan.best.layout.student_pool.per_node
    needs = sum(part.devices for part in fleet.parts)
    pools = {part.device for part in fleet.parts}
    if fleet.servers and (machines or fleet.student.machines > 1 or needs > room or len(pools) > 1):
        raise UserError(
            f"the plan's teacher does not fit beside the student on one machine: they need {fleet.gpus} GPUs of "
            f"{', '.join(sorted(pools))} (the teacher's once for each role), and a machine has {room}; a Job ends no "
            "servers on other machines: start them apart (distill teacher serve) and name them in teacher.urls"
        )
    if (
        fleet.schedule.cron is not None
        and fleet.schedule.catch_up == "none"
        and (fleet.schedule.starting_deadline_seconds is None)
    ):
        raise UserError(
            "schedule.catch_up is none, and a CronJob runs the latest that it missed unless it has a deadline; set "
            "schedule.starting_deadline_seconds, or schedule.catch_up to latest"
        )


def _labels(fleet: Fleet, *, queue: bool = False) -> Object:
    labels = {"app.kubernetes.io/name": "distill", "app.kubernetes.io/instance": fleet.name}
    name = fleet.settings.kubernetes.queue
    return {**labels, _KUEUE_LABEL: name} if queue and name is not None else labels


def _metadata(fleet: Fleet, *, queue: bool, name: str | None = None) -> Object:
    namespace = fleet.needed("kubernetes.namespace", "Kubernetes", example="default")
    return {"name": name or fleet.name, "namespace": namespace, "labels": _labels(fleet, queue=queue)}


def _config_map(fleet: Fleet) -> Object:
    scripts = {f"{part.name}.sh": _script(fleet, part) for part in fleet.parts}
    data = {"recipe.yaml": fleet.recipe, **scripts}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(fleet, queue=False), "data": data}


def _service(fleet: Fleet) -> Object:
    # A name has to be known before the pod behind it is ready: they become ready together.
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": _labels(fleet)}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(fleet, queue=False), "spec": spec}


def _script(fleet: Fleet, part: Part) -> str:
    # Each Job of a CronJob is another run; the pods that one Job has in turn are one.
    name = fleet.name if fleet.schedule.cron is None else Read('"$DISTILL_JOB_NAME"')
    run = joined(f"{fleet.settings.out}/", name)
    if isinstance(part, Server):
        command = part.command(host="127.0.0.1", machine=Read("0"), first=Read("127.0.0.1"))
    else:
        hosts = {server.name: [Read("127.0.0.1")] for server in fleet.servers}
        command = fleet.run_command(Read(f"{_SCRIPTS}/recipe.yaml"), hosts=hosts)
        command += ["--processes", str(part.processes)]
        if part.machines > 1:
            first = Read(f'"$DISTILL_JOB_NAME-0.{fleet.name}:{STUDENT_PORT}"')
            command += ["--nodes", str(part.machines), "--node-rank", Read('"$JOB_COMPLETION_INDEX"')]
            command += ["--node-address", first]
    # The command takes the shell's place, so that Kubernetes' TERM reaches it.
    return "\n".join(["#!/bin/bash", *opening(fleet.settings, run), f"exec {line(command)}"]) + "\n"


def _job(fleet: Fleet) -> Object:
    schedule, machines = fleet.schedule, fleet.student.machines
    limit = schedule.active_deadline_seconds
    codes = {"containerName": "student", "operator": "In"}
    return {
        # Where one machine fails, the others' pods end with it, each of them a failure.
        "backoffLimit": schedule.backoff_limit * machines,
        **({} if limit is None else {"activeDeadlineSeconds": limit}),
        **({} if machines == 1 else {"completionMode": "Indexed", "completions": machines, "parallelism": machines}),
        **({} if fleet.settings.kubernetes.queue is None else {"suspend": True}),
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {**codes, "values": [2]}},
                {"action": "Ignore", "onExitCodes": {**codes, "values": [75]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": _labels(fleet)}, "spec": _pod(fleet)},
    }


def _pod(fleet: Fleet) -> Object:
    settings = fleet.settings.kubernetes
    grace = int(-(-fleet.schedule.termination_grace_period_seconds // 1))
    servers = [
        {**_container(fleet, server), "restartPolicy": "Always", "startupProbe": _probe(fleet, server)}
        for server in fleet.servers
    ]
    claims = list(dict.fromkeys(volume.claim for volume in settings.volumes))
    volumes: list[Object] = [
        {"name": "scripts", "configMap": {"name": fleet.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shared_memory_gb:g}G"}},
        *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
    ]
    chosen: list[tuple[str, Any]] = [
        ("subdomain", fleet.name if fleet.student.machines > 1 else None),
        ("serviceAccountName", settings.service_account),
        ("priorityClassName", settings.priority_class),
        ("nodeSelector", settings.node_selector or None),
        ("tolerations", [dict(one) for one in settings.tolerations] or None),
        ("imagePullSecrets", [{"name": name} for name in settings.image_pull_secrets] or None),
        # A server among the init containers that is always restarted is a sidecar: it ends when the student has ended.
        ("initContainers", servers or None),
    ]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        **{key: value for key, value in chosen if value is not None},
        "containers": [_container(fleet, fleet.student)],
        "volumes": volumes,
    }


def _container(fleet: Fleet, part: Part) -> Object:
    settings = fleet.settings.kubernetes
    mounts = [{"name": volume.claim, "mountPath": volume.path} for volume in settings.volumes]
    return {
        "name": part.name,
        "image": fleet.needed("image", "Kubernetes", example="REGISTRY/IMAGE:TAG"),
        "command": ["bash", f"{_SCRIPTS}/{part.name}.sh"],
        "env": list(_environment(fleet)),
        "resources": _resources(fleet, part),
        "volumeMounts": [
            {"name": "scripts", "mountPath": _SCRIPTS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *mounts,
        ],
    }


def _environment(fleet: Fleet) -> Iterator[Object]:
    yield {"name": "DISTILL_JOB_NAME", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{_JOB_NAME}']"}}}
    for name, secret in fleet.settings.kubernetes.secrets.items():
        yield {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}


def _resources(fleet: Fleet, part: Part) -> Object:
    settings = fleet.settings
    asked: Object = {}
    if settings.cpus_per_gpu is not None:
        asked["cpu"] = str(settings.cpus_per_gpu * part.devices)
    if settings.memory_gb_per_gpu is not None:
        asked["memory"] = f"{settings.memory_gb_per_gpu * part.devices}G"
    gpus = {settings.kubernetes.gpu_resource: str(part.gpus)} if part.has_gpus else {}
    # GPUs are asked for as a limit; the request follows from it.
    limits = {**gpus, **({"memory": asked["memory"]} if "memory" in asked else {})}
    return {**({"requests": asked} if asked else {}), **({"limits": limits} if limits else {})}


def _probe(fleet: Fleet, server: Server) -> Object:
    """The student's container begins when every replica answers."""
    asks = "; ".join(f"u('http://127.0.0.1:{port}/health')" for port in server.ports)
    return {
        "exec": {"command": ["python3", "-c", f"from urllib.request import urlopen as u; {asks}"]},
        "periodSeconds": _PROBE_SECONDS,
        "timeoutSeconds": _PROBE_SECONDS,
        "failureThreshold": int(-(-fleet.settings.teacher_start_seconds // _PROBE_SECONDS)),
    }
