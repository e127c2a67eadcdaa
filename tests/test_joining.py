"""Processes that a cluster starts meet: the batch script and the Job's pods, as they are rendered, run whole.

Slurm's tools are stand-ins, for the real ones want a cluster: scripts that set what srun 22.05 sets, start the tasks,
signal them, and note that the job is queued again. What Kubernetes does for a Job is done here: files, variables and a
shell for each pod.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_parallel import SMALL, assert_same_curve, finish, metrics

from distill.vllm.service import free_port
from pipelines.clusters.fleet import STUDENT_PORT
from pipelines.clusters.order import order
from pipelines.clusters.rendering import ENGINES

pytestmark = pytest.mark.slow

NAME, HOST = "pair", "127.0.0.1"

SRUN = """\
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --ntasks=*) tasks=${1#*=} ;;
    --ntasks-per-node=*) each=${1#*=} ;;
    --job-name=*) name=${1#*=} ;;
    --nodelist) names=$2; shift ;;
    --overlap | --cpu-bind=none | --kill-on-bad-exit=0) ;;
    *) echo "srun: no stand-in for $1" >&2; exit 1 ;;
  esac
  shift
done
[ "$tasks" = $((nodes * each)) ] || { echo "srun: $tasks tasks on $nodes nodes of $each" >&2; exit 1; }
IFS=, read -r -a machines <<< "$names"
[ "${#machines[@]}" = "$nodes" ] || { echo "srun: $nodes nodes, and named are $names" >&2; exit 1; }
export SLURM_JOB_NAME=$name SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NUM_NODES=$nodes
export SLURM_STEP_NODELIST=$names SLURM_STEP_TASKS_PER_NODE="$each(x$nodes)" SLURM_NTASKS=$tasks SLURM_NPROCS=$tasks
export SLURM_STEP_LAUNCHER_PORT=40311 SLURM_SRUN_COMM_HOST=127.0.0.1 SLURM_SRUN_COMM_PORT=40311 SLURM_DISTRIBUTION=block
export SLURM_LAUNCH_NODE_IPADDR=127.0.0.1 SLURM_CPU_BIND=quiet,none SLURM_CPU_BIND_TYPE=none SLURM_UMASK=0022
started=()
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task SLURM_GTIDS=$task SLURM_LOCALID=$((task % each)) SLURM_NODEID=$((task / each)) \\
    SLURMD_NODENAME=${machines[task / each]} "$@" &
  started+=($!)
done
echo "${started[@]}" > "$STAND_INS/step"
code=0
for task in "${started[@]}"; do
  wait "$task" || { ended=$?; [ "$code" -ge "$ended" ] || code=$ended; }
done
exit "$code"
"""

TOOLS = {
    "distill": f'exec {sys.executable} -m distill.cli "$@"\n',
    "srun": SRUN,
    "squeue": 'echo "$SLURM_JOB_ID.0 student"\n',
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID.0" ] || exit 1\nkill -TERM $(cat "$STAND_INS/step")\n',
    "scontrol": """\
case "$*" in
  "show hostnames two-machines") echo 127.0.0.1; echo localhost ;;
  "show job $SLURM_JOB_ID") echo "   JobState=RUNNING Reason=None" ;;
  "requeue $SLURM_JOB_ID") echo again >> "$STAND_INS/requeued" ;;
  *) exit 1 ;;
esac
""",
}

BATCH = {
    "SLURM_JOB_ID": "100",
    "SLURM_JOB_NAME": NAME,
    "SLURM_JOB_NODELIST": "two-machines",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    # The script is a task too, number 0 of one, though the job's tasks are two.
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
}
"""What sbatch sets for its script."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(out, 1)
    return out


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in TOOLS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return folder


def rendered(folder: Path, on: str) -> str:
    """The embedded pair's run on two machines, as ``distill launch`` would write it."""
    job: dict[str, Any] = {
        "extends": "embedded",
        "launch": {
            "gpus": "2x1xCPU",
            "out": str(folder / "runs"),
            "environment": {"DISTILL_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"},
            "image": "registry.example/distill:1",
            "slurm": {"time": "60"},
            "kubernetes": {"namespace": "default", "volumes": [{"claim": "runs", "path": str(folder)}]},
        },
    }
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(job))
    fleet = order(path, on=on, assignments=[f"{key}={value}" for key, value in SMALL.items()])[0].fleet
    # The plan does not spread so small a student.
    text = ENGINES[on].render(replace(fleet, student=replace(fleet.student, machines=2)))
    # A port of its own: whoever else runs this on the machine has the usual one.
    text, num_ports = re.subn(rf"\b{STUDENT_PORT}\b", str(free_port(HOST)), text)
    assert num_ports == 1
    return text


Start = Callable[[Sequence[str], dict[str, str]], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command; what still waits for others at the end of a test that failed is asked to stop."""
    started: list[subprocess.Popen[str]] = []

    def begin(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def ended(process: subprocess.Popen[str], expected: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == expected, stdout + stderr
    return stdout + stderr


def test_a_batch_script_is_one_run_also_when_it_is_queued_again(
    alone: Path, tools: Path, start: Start, tmp_path: Path
) -> None:
    """TERM reaches the script alone, as Slurm sends it; what the second attempt ends is the curve of one process."""
    script, out = tmp_path / "script", tmp_path / "runs" / NAME
    script.write_text(rendered(tmp_path, "slurm"))
    # Slurm hands on what the submitting shell had.
    environment = {**os.environ, **BATCH, "PATH": f"{tools}:{os.environ['PATH']}", "STAND_INS": str(tmp_path)}

    attempt = start(["bash", str(script)], environment)
    deadline = time.monotonic() + 200
    while len(metrics(out)) < 3 and attempt.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    attempt.send_signal(signal.SIGTERM)
    said = ended(attempt, 75)
    assert said.count("the same command resumes it") == 1 and "job 100 is queued again" in said
    assert 3 <= len(metrics(out)) < len(metrics(alone))
    assert (tmp_path / "requeued").read_text() == "again\n"

    ended(start(["bash", str(script)], environment))
    assert_same_curve(out, alone)
    assert yaml.safe_load((out / "manifest.json").read_text())["machine"]["processes"] == 2


def test_the_pods_of_a_job_are_one_run(alone: Path, tools: Path, start: Start, tmp_path: Path) -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all(rendered(tmp_path, "kubernetes"))}
    job, service = documents["Job"], documents["Service"]
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (scripts,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "scripts")
    assert spec["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == 2

    def start_pod(index: int) -> subprocess.Popen[str]:
        pod = f"{job['metadata']['name']}-{index}"
        labels = {
            **job["spec"]["template"]["metadata"]["labels"],
            "batch.kubernetes.io/job-name": job["metadata"]["name"],
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        fields = {f"metadata.labels['{key}']": value for key, value in labels.items()}
        environment = {
            "PATH": f"{tools}:{os.defpath}",
            "HOSTNAME": pod,
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "KUBERNETES_SERVICE_PORT": "443",
            "JOB_COMPLETION_INDEX": str(index),
            **{one["name"]: fields[one["valueFrom"]["fieldRef"]["fieldPath"]] for one in container["env"]},
            # An image has the program installed; here it may be this checkout's.
            **{name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ},
        }
        mounted = tmp_path / pod
        mounted.mkdir()
        for name, text in documents["ConfigMap"]["data"].items():
            first = f'"$DISTILL_JOB_NAME-0.{spec["subdomain"]}:'
            assert name != "student.sh" or text.count(first) == 1
            (mounted / name).write_text(text.replace(scripts, str(mounted)).replace(first, f'"{HOST}:'))
        return start([word.replace(scripts, str(mounted)) for word in container["command"]], environment)

    pods = [start_pod(1), start_pod(0)]
    for pod in pods:
        ended(pod)
    out = tmp_path / "runs" / NAME
    assert_same_curve(out, alone)
    assert yaml.safe_load((out / "manifest.json").read_text())["machine"]["processes"] == 2
