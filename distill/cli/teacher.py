"""``distill teacher``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import MACHINES, PROCESSES, Json, NodeAddress, one_of, one_of_many

app = typer.Typer(help="A teacher's vLLM server.", no_args_is_help=True)


@app.command("serve")
def teacher_serve(
    teacher: Annotated[str, typer.Option(help="235B, 32B, ..., tiny, a hub id or a folder.")],
    role: Annotated[str, typer.Option(help="generate (responses) or score (hidden states).")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: one that is free.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = "127.0.0.1",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default bfloat16, float32 on a CPU.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Longest prompt and response together.")] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tp", min=1, max=PROCESSES, help="GPUs that each layer is cut over.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option("--pp", min=1, max=PROCESSES, help="Groups that the layers are cut into.")
    ] = 1,
    num_replicas: Annotated[
        int,
        typer.Option(
            "--replicas",
            min=1,
            max=PROCESSES,
            help="Servers side by side, at PORT, PORT+1, ...; each has its own GPUs.",
        ),
    ] = 1,
    quantization: Annotated[
        str | None, typer.Option(help="Quantise while loading, by vLLM's name: fp8, fp8_per_block, ...")
    ] = None,
    num_nodes: Annotated[
        int, typer.Option("--nodes", min=1, max=MACHINES, help="Machines that one server is spread over.")
    ] = 1,
    node_rank: Annotated[
        int, typer.Option(min=0, max=MACHINES - 1, help="This machine's number among them; 0 answers requests.")
    ] = 0,
    node_address: NodeAddress = None,
    python: Annotated[Path | None, typer.Option(help="Interpreter of the environment that has vLLM.")] = None,
    log: Annotated[Path, typer.Option(help="The server's log.")] = Path("teacher.log"),
    server_args: Annotated[list[str] | None, typer.Option("--server-arg", help="Goes to vLLM as it is.")] = None,
    as_json: Json = False,
) -> None:
    """Serve TEACHER in one role until Ctrl-C or SIGTERM; prints its URL, one a line, when it is ready.

    A run uses it with --teacher-url http://HOST:PORT. An API key is taken from DISTILL_TEACHER_API_KEY. Over several
    machines every one of them gives the same command with its own --node-rank.

    Examples:

      distill teacher serve --teacher 32B --role score --port 8001 --tp 2 --replicas 4

      distill teacher serve --teacher Qwen/Qwen3-235B-A22B-FP8 --role generate --tp 8

      distill teacher serve --teacher 235B --role score --tp 8 --pp 2 --nodes 2 --node-address gpu-1 --node-rank 0
    """
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from distill.vllm.launch import Nodes
        from pipelines.serving import serve

        serve(
            teacher,
            one_of(role, "--role", ("generate", "score")),
            port=port,
            host=host,
            dtype=None if dtype is None else one_of(dtype, "--dtype", ("bfloat16", "float32")),
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            num_replicas=num_replicas,
            quantization=quantization,
            nodes=one_of_many(Nodes, num_nodes, node_rank, node_address),
            python=None if python is None else str(python),
            log=log,
            server_args=server_args or (),
            on_ready=lambda urls: print(json.dumps({"urls": urls}) if as_json else "\n".join(urls), flush=True),
        )
