"""Every flag that a server may be started with, against the argument parser of the vLLM that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from distill.checkpoint import open_checkpoint
from distill.errors import UserError
from distill.family import resolve
from distill.vllm.launch import ROLES, Launch, Nodes
from students.weight_sync import check_uncut

pytestmark = pytest.mark.server

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
parsed = [{name: getattr(parser.parse_args(flags), name) for name in sys.argv[1:]} for flags in json.load(sys.stdin)]
print(json.dumps([parsed, list(QUANTIZATION_METHODS)]))
"""
DESTINATIONS = (
    *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "quantization"),
    *("nnodes", "node_rank", "master_addr", "master_port", "headless"),
    *("runner", "convert", "logprobs_mode", "max_model_len", "disable_uvicorn_access_log"),
)


def test_the_installed_vllm_knows_every_flag() -> None:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    experts = replace(teacher, config={**teacher.config, "moe_intermediate_size": 1536})
    launches = [
        Launch(
            experts,
            role,
            dtype="bfloat16",
            max_model_len=64,
            on_gpu=on_gpu,
            tensor_parallel=8,
            pipeline_parallel=2,
            quantization="fp8_per_block",
            nodes=Nodes(2, rank, "gpu-1", 7000),
        )
        for role in ROLES
        for on_gpu in (True, False)
        for rank in (0, 1)
    ]
    # What comes after the program: `-m MODULE`, and `serve` where there is a subcommand.
    flags = [[part for part in launch.command(8000)[3:] if part != "serve"] for launch in launches]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *DESTINATIONS],
        input=json.dumps(flags),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed, methods = json.loads(done.stdout.splitlines()[-1])
    assert {"fp8", "fp8_per_block"} <= set(methods)
    for launch, found in zip(launches, parsed, strict=True):
        assert launch.nodes is not None
        assert (found["tensor_parallel_size"], found["pipeline_parallel_size"]) == (8, 2)
        assert found["enable_expert_parallel"] and found["quantization"] == "fp8_per_block"
        assert (found["nnodes"], found["node_rank"], found["headless"]) == (2, launch.nodes.rank, not launch.answers)
        assert (found["master_addr"], found["master_port"], found["max_model_len"]) == ("gpu-1", 7000, 64)
        assert found["disable_uvicorn_access_log"]
        if launch.role == "score":
            assert (found["runner"], found["convert"]) == ("pooling", "embed")
        else:
            assert found["logprobs_mode"] == "raw_logprobs"


OPTIONS = """
import json
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
print(json.dumps({option: action.dest for option, action in parser._option_string_actions.items()}))
"""
CUTS = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")


def test_whatever_the_installed_vllm_takes_for_a_cut_is_refused_and_no_other_flag_is() -> None:
    done = subprocess.run([sys.executable, "-c", OPTIONS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    options = json.loads(done.stdout.splitlines()[-1])
    cuts = {option for option, name in options.items() if name in CUTS or name.startswith("data_parallel")}
    assert {"-tp", "--pipeline-parallel-size", "--data-parallel-size-local"} <= cuts
    cuts -= {option for option in cuts if option.startswith("--no-")}  # they say what is so without them
    for option in options.keys() - cuts:
        check_uncut([option, f"{option}=x"])
    for option in cuts:
        for end in range(2, len(option) + 1):
            # argparse takes what begins one option alone, and leaves the others to an error of its own.
            begun = [other for other in options if other.startswith(option[:end])]
            if begun == [option] or option[:end] == option:
                with pytest.raises(UserError, match="whole in one process"):
                    check_uncut([option[:end]])
