"""The door: ``distill run``, ``distill eval``, ``distill report``, ``distill teacher``, ``distill responses``.

Standard output carries results only (with ``--json``, one JSON document); progress and errors go to standard error.
A user's error is one sentence and exit code 2, a failure 1, a clean stop 75, Ctrl-C 130. Heavy modules are imported by
the command that needs them, so that ``--help`` answers at once. The one module of this package that may import the
packages above it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from distill.errors import DistillError, GuardError, NonFiniteError, PeerError, StoppedError, UserError
from distill.progress import complain, say

if TYPE_CHECKING:
    from distill.config import RunConfig, TaskSettings
    from teachers.service import Nodes

app = typer.Typer(
    help="Make a small Qwen3 strong: distil a large one into it, off-policy and then on-policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

teacher_app = typer.Typer(help="A teacher's vLLM server.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")
responses_app = typer.Typer(help="The store of teachers' responses.", no_args_is_help=True)
app.add_typer(responses_app, name="responses")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Store = Annotated[Path | None, typer.Option(help="Folder of the store; default DISTILL_STORE or the user's cache.")]
Collection = Annotated[str, typer.Option(help="Only collections with this in their folder's name.")]


@app.callback()
def _root() -> None:
    """Strong-to-weak distillation (Qwen3 Technical Report, section 4.5)."""


@app.command()
def run(
    teacher: Annotated[str | None, typer.Option(help="235B, 32B, ..., tiny, a hub id or a folder.")] = None,
    student: Annotated[str | None, typer.Option(help="4B (its base), ..., nano, a hub id or a folder.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="JSONL or parquet with a column 'prompt', or a hub set: OWNER/NAME@REVISION.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed is another run.")] = None,
    store: Annotated[str | None, typer.Option(help="Folder of the teacher-response store.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name or a YAML file.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: --set stages.on_policy.steps=100")
    ] = None,
    teacher_urls: Annotated[
        list[str] | None,
        typer.Option("--teacher-url", help="A vLLM server of the teacher that runs already; again for a further one."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the work; default one a GPU, else one.")
    ] = None,
    skip_preflight: Annotated[
        list[str] | None, typer.Option("--skip-preflight", metavar="NAME", help="Leave out one check; recorded.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Distil TEACHER into STUDENT: both stages, examined before, between and after.

    The same command again resumes an interrupted run; on a finished one it prints the summary.

    Examples:

      distill run                                      the embedded pair, minutes on a CPU

      distill run --teacher 4B --student 0.6B --prompts my.jsonl --out runs/mine

      distill run --seed 1 --out runs/seed1 --set stages.on_policy.steps=100

      distill run --teacher 32B --student 4B --teacher-url http://gpu-1:8000 --teacher-url http://gpu-2:8000
    """
    from pipelines.resolution import resolve_run

    if teacher_urls:
        from pipelines.hiring import found_servers

        assignments = [*(assignments or []), *found_servers(teacher_urls)]
    config = resolve_run(
        recipe=recipe,
        teacher=teacher,
        student=student,
        prompts=prompts,
        seed=seed,
        assignments=[
            *(assignments or []),
            *([f"store={json.dumps(store)}"] if store else []),
            *([f"preflight.skip={json.dumps(skip_preflight)}"] if skip_preflight else []),
        ],
    )
    folder = out or Path("runs") / str(config.name)
    if dry_run:
        _print_dry_run(config, folder, as_json, processes)
        return
    from pipelines.launch import own_command, processes_to_start, run_processes

    count = processes_to_start(processes)
    if count > 1:
        sys.exit(run_processes(own_command(sys.argv[1:]), count))
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from pipelines.strong_to_weak import run as run_pipeline
        from students.ranks import joined_ranks

        with joined_ranks() as ranks:
            try:
                summary = run_pipeline(config, folder, command=["distill", *sys.argv[1:]], ranks=ranks)
            except DistillError as error:
                if error.exit_code in (75, 130):
                    say(f"The run is safe in {folder}; the same command resumes it.")
                raise
        if not ranks.is_main:
            return
    if as_json:
        print(json.dumps(summary, allow_nan=False))
    else:
        from eval.table import print_summary

        print_summary(summary)


def _print_dry_run(config: RunConfig, folder: Path, as_json: bool, processes: int | None) -> None:
    from distill.family import resolve, shape_of
    from distill.memory import GPU_BYTES, Planned, plan
    from distill.recipe import dump_yaml

    teacher = resolve(config.teacher.model, role="teacher", revision=config.teacher.revision)
    student = resolve(config.student.model, role="student", revision=config.student.revision)
    shapes = shape_of(config.student.model), shape_of(config.teacher.model)
    planned = None if None in shapes else plan(config, *shapes, processes=processes)  # type: ignore[arg-type]
    steps = [
        f"teacher {teacher.name}: {teacher.location}",
        f"student {student.name}: {student.location}",
        f"examine the teacher and the start in {' and '.join(config.evaluation.modes)}",
        *(f"stage {name}: {settings.kind}, then examine" for name, settings in config.stages.items()),
        f"write {folder}/student, summary.json and report.html",
    ]
    if as_json:
        document = {"out": str(folder), "config": config.model_dump(mode="json"), "plan": steps}
        print(json.dumps({**document, "memory": None if planned is None else planned.to_json()}))
        return
    print(dump_yaml(config), end="")
    print(f"# into {folder}:")
    for line in steps:
        print(f"#   {line}")
    if isinstance(planned, Planned):
        for line in planned.lines(GPU_BYTES):
            print(f"# {line}")
    else:
        print("# memory: the models' shapes are not known before they are opened")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A model folder, a run, an embedded or size name, a hub id, or a vLLM server's URL.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task's name, mode_switching, or a JSONL file with prompt and answer [default: embedded]"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Local copy of the task's set, or prompts to converse on.")] = None,
    mode: Annotated[str, typer.Option(help="think, no_think or both.")] = "both",
    budget: Annotated[
        list[str] | None, typer.Option(help="Thinking budgets in tokens: 8,16,24, or the option repeated.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses to each question [default: the task's; 64 for AIME, else 1]")
    ] = None,
    pass_at: Annotated[
        list[str] | None, typer.Option(help="The k of pass@k, like --budget [default: the number of samples]")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Only the task's first questions; conversations of mode_switching.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response [default: the report's]")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="For a server's URL: size name, hub id or folder of the model that it serves.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the responses.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scores and per-sample parquet; resumes.")] = None,
    as_json: Json = False,
) -> None:
    """Examine a checkpoint on tasks, in one mode or both, with the report's prompts and sampling for each mode.

    With --budget, thinking is cut at each budget by the early-stop string; with --mode both, thinking without a budget
    and non-thinking are there for comparison.

    Examples:

      distill eval nano --task embedded --mode both --samples 4

      distill eval runs/tiny-to-nano --budget 8,16,24,48 --json

      distill eval runs/tiny-to-nano --task mode_switching

      distill eval http://127.0.0.1:8000 --tokenizer 4B --task gsm8k --data /data/gsm8k
    """
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from pipelines.examination import examine

        scores = examine(
            checkpoint,
            tasks=_tasks(task or ["embedded"], data, _numbers(pass_at, "--pass-at")),
            modes=_modes(mode),
            budgets=_numbers(budget, "--budget"),
            samples=samples,
            num_questions=questions,
            max_new_tokens=max_new_tokens,
            seed=seed,
            out=out,
            tokenizer=tokenizer,
        )
    if as_json:
        print(json.dumps(scores, allow_nan=False))
    else:
        from eval.table import print_scores

        print_scores([*scores["scores"], *scores["slices"]])


def _tasks(names: list[str], data: Path | None, pass_at: tuple[int, ...]) -> list[TaskSettings]:
    from eval.tasks import settings_of

    if data is not None and len(names) > 1:
        raise UserError(f"--data is one task's, and there are {len(names)}; give the command once for each")
    found = [settings_of(name) for name in names]
    if data is not None and found[0].path is not None:
        raise UserError(f"--task {names[0]} is a file itself; leave --data {data} out")
    more: dict[str, Any] = {"pass_at": pass_at} | ({} if data is None else {"path": str(data)})
    return [settings.model_copy(update=more) for settings in found]


def _numbers(texts: list[str] | None, option: str) -> tuple[int, ...]:
    """Positive whole numbers, separated by commas or given in turn."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) > 0):
            raise UserError(f"{option} {part!r} is no whole number from 1 on; write {option} 8,16,24")
    return tuple(sorted({int(part) for part in parts}))


def _modes(mode: str) -> tuple[Any, ...]:
    from distill.types import MODES

    if mode == "both":
        return MODES
    if mode not in MODES:
        raise UserError(f"--mode {mode!r} is none of {', '.join(MODES)}, both")
    return (mode,)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    as_json: Json = False,
) -> None:
    """Write RUN/report.html again from the run's files.

    Example:

      distill report runs/tiny-to-nano
    """
    from eval.report import write_report

    path = write_report(run)
    print(json.dumps({"report": str(path)}) if as_json else path)


@teacher_app.command("serve")
def teacher_serve(
    teacher: Annotated[str, typer.Option(help="235B, 32B, ..., tiny, a hub id or a folder.")],
    role: Annotated[str, typer.Option(help="generate (responses) or score (hidden states).")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: one that is free.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = "127.0.0.1",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default bfloat16, float32 on a CPU.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Longest prompt and response together.")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="GPUs that each layer is cut over.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option("--pp", min=1, help="Groups that the layers are cut into.")] = 1,
    num_replicas: Annotated[
        int,
        typer.Option("--replicas", min=1, help="Servers side by side, at PORT, PORT+1, ...; each has its own GPUs."),
    ] = 1,
    quantization: Annotated[
        str | None, typer.Option(help="Quantise while loading, by vLLM's name: fp8, fp8_per_block, ...")
    ] = None,
    num_nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines that one server is spread over.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="This machine's number among them; 0 answers requests.")] = 0,
    node_address: Annotated[
        str | None, typer.Option("--node-address", help="Where machine 0 is for the others, as HOST or HOST:PORT.")
    ] = None,
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
        from pipelines.serving import serve

        serve(
            teacher,
            _one_of(role, "--role", ("generate", "score")),
            port=port,
            host=host,
            dtype=None if dtype is None else _one_of(dtype, "--dtype", ("bfloat16", "float32")),
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            num_replicas=num_replicas,
            quantization=quantization,
            nodes=_nodes(num_nodes, node_rank, node_address),
            python=None if python is None else str(python),
            log=log,
            server_args=server_args or (),
            on_ready=lambda urls: print(json.dumps({"urls": urls}) if as_json else "\n".join(urls), flush=True),
        )


def _nodes(num: int, rank: int, address: str | None) -> Nodes | None:
    from teachers.service import Nodes

    if num == 1:
        if rank or address:
            raise UserError("--node-rank and --node-address belong to --nodes; say how many machines there are")
        return None
    if address is None:
        raise UserError(f"--nodes {num} needs --node-address, the host name of machine 0 as the others see it")
    host, _, port = address.rpartition(":") if address.rpartition(":")[2].isdigit() else (address, "", "")
    return Nodes(num, rank, host, int(port)) if port else Nodes(num, rank, host)


@responses_app.command("ls")
def responses_list(store: Store = None, collection: Collection = "", as_json: Json = False) -> None:
    """List the collections: whose responses they hold, how they were drawn, how many and how large.

    Example:

      distill responses ls --store runs/store
    """
    from pipelines.listing import print_collections
    from teachers.inspection import list_collections
    from teachers.store import default_root

    root = store or default_root()
    found = list_collections(root, collection)
    if as_json:
        print(json.dumps({"store": str(root), "collections": found}, allow_nan=False))
    else:
        print_collections(str(root), found)


@responses_app.command("show")
def responses_show(
    key: Annotated[str | None, typer.Argument(help="The first letters of a response's key.")] = None,
    num: Annotated[int, typer.Option("--first", min=1, help="Without a key: how many are shown.")] = 3,
    store: Store = None,
    collection: Collection = "",
    as_json: Json = False,
) -> None:
    """Show responses: what was asked and said, forced tokens marked.

    Examples:

      distill responses show 5c48c5

      distill responses show --first 10 --collection tiny --json
    """
    from pipelines.listing import print_responses
    from teachers.inspection import show_responses
    from teachers.store import default_root

    root = store or default_root()
    found = show_responses(root, key=key, num=num, name=collection)
    if as_json:
        print(json.dumps({"store": str(root), "responses": found}, allow_nan=False))
    else:
        print_responses(found)


@responses_app.command("stats")
def responses_stats(store: Store = None, collection: Collection = "", as_json: Json = False) -> None:
    """Statistics of each collection by mode: lengths, truncation, closed thinking, repetition.

    Example:

      distill responses stats --collection tiny
    """
    from pipelines.listing import print_statistics
    from teachers.inspection import statistics
    from teachers.store import default_root

    root = store or default_root()
    found = statistics(root, collection)
    if as_json:
        print(json.dumps({"store": str(root), "collections": found}, allow_nan=False))
    else:
        print_statistics(found)


def _one_of(value: str, option: str, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise UserError(f"{option} {value!r} is none of {', '.join(known)}")
    return value


def main() -> None:
    """The console script: sentences instead of tracebacks for what is no bug."""
    _leave(_exit_code())


def _exit_code() -> int:
    """Have the command work; the code to leave with."""
    try:
        app()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except PeerError as error:
        return error.exit_code
    except DistillError as error:
        # What all processes of a run meet at once, the main one says; what one meets alone, that one.
        shared = isinstance(error, StoppedError | NonFiniteError | GuardError)
        (say if shared else complain)(f"distill: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("distill: interrupted")
        return 130
    return 0


def _leave(code: int) -> NoReturn:
    ranks = sys.modules.get("students.ranks")
    if ranks is not None and ranks.has_joined:
        # Threads of the process group may outlive it, and C++ aborts a process that ends with one of them alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
