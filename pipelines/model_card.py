"""The card of an exported student: what it was made from, how, how good it is and what it cost.

Its head is the YAML that the hub reads. Everything comes from the run directory. Names of local folders are shortened
to their last part: a card may be public.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import jinja2
import yaml

from distill.config import RunConfig
from distill.errors import UserError
from distill.family import ModelSource, resolve
from distill.journal import read_json
from distill.prompt_config import HubPrompts
from distill.types import MODES
from eval.page import MODE_NAMES, count, duration, percent
from eval.published import PUBLISHED
from eval.run_files import read_lines
from eval.switching import TASK as MODE_SWITCHING

ENDS = 5
"""Steps at each end of a stage over which its divergence is averaged."""

Document = dict[str, Any]


def model_card(run: Path, config: RunConfig, *, form: str, name: str) -> str:
    """The text of README.md for the student of ``run``, exported in ``form`` as a model called ``name``."""
    summary, manifest = read_json(run / "summary.json"), read_json(run / "manifest.json")
    base = source_of(config.student.model, role="student")
    teacher = source_of(config.teacher.model, role="teacher")
    last = list(config.stages)[-1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": count, "seconds": duration}
    text: str = environment.get_template("model_card.md.jinja").render(
        front=yaml.safe_dump(_front(config, summary, base, form=form, name=name), sort_keys=False, allow_unicode=True),
        name=name,
        form=form,
        rank=None if config.student.lora is None else config.student.lora.rank,
        base=_shown(base),
        base_revision=manifest["student"]["revision"],
        is_base_on_hub=base.kind == "hub",
        teacher=_shown(teacher),
        teacher_revision=manifest["teacher"]["revision"],
        specialists={
            domain: _shown(source_of(one.model, role="teacher")) for domain, one in config.specialists.items()
        },
        data=list(_data(config)),
        prompts_hash=manifest["prompts"],
        stages=config.stages,
        last=last,
        scores=_score_table(summary["scores"]),
        checkpoints=list(dict.fromkeys(entry["checkpoint"] for entry in summary["scores"])),
        gaps={MODE_NAMES[mode]: share for mode, share in summary["gap_closed"].items() if share is not None},
        divergences=_divergences(run / "metrics.jsonl"),
        costs=summary["costs"],
        total={key: sum(cost[key] for cost in summary["costs"].values()) for key in ("tokens", "flops", "seconds")},
        command=without_places(manifest["command"]),
        seed=config.seed,
        versions=manifest["versions"],
        percent=percent,
    )
    return text


def source_of(name: str, *, role: Literal["teacher", "student"]) -> ModelSource:
    """What the name means; a folder that is gone meanwhile is still a folder's name."""
    try:
        return resolve(name, role=role)
    except UserError:
        return ModelSource(name, "directory", name)


def _shown(source: ModelSource) -> str:
    return {"hub": source.location, "embedded": f"the embedded model {source.name}"}.get(
        source.kind, f"a local model ({Path(source.location).name})"
    )


_PLACE = re.compile(r"""(?:[a-z]+://|(?<![\w.~-])(?:~|\.{1,2})?/)[^\s,\]}'"]+""")


def without_places(command: str) -> str:
    """A command without hosts, and of each path only the last part."""
    return _PLACE.sub(lambda found: "..." if "://" in found[0] else Path(found[0]).name, command)


def _front(config: RunConfig, summary: Document, base: ModelSource, *, form: str, name: str) -> Document:
    """What the hub reads."""
    front: Document = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
    }
    if base.kind == "hub":
        front["base_model"] = base.location
        front["base_model_relation"] = "adapter" if form == "adapter" else "finetune"
    if base.location.startswith("Qwen/Qwen3"):
        front["license"] = "apache-2.0"  # that of every model of the family
    if isinstance(config.prompts, HubPrompts):
        front["datasets"] = list(dict.fromkeys(one.id for one in config.prompts.sets))
    front["tags"] = ["distillation", "strong-to-weak", *sorted({stage.kind for stage in config.stages.values()})]
    last = list(config.stages)[-1]
    results = [_result(entry) for entry in summary["scores"] if entry["checkpoint"] == last]
    front["model-index"] = [{"name": name, "results": results}]
    return front


def _result(entry: Mapping[str, Any]) -> Document:
    task = entry["task"]
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": task, "type": PUBLISHED[task].id if task in PUBLISHED else task},
        "metrics": [{"type": entry["metric"], "name": f"{entry['metric']}, {_asked(entry)}", "value": entry["mean"]}],
    }


def _asked(entry: Mapping[str, Any]) -> str:
    """How the questions were asked."""
    if entry["task"] == MODE_SWITCHING:
        return "both modes in turn"
    budget = f", budget {entry['thinking_budget']}" if "thinking_budget" in entry else ""
    return MODE_NAMES[entry["mode"]] + budget


def _score_table(entries: Sequence[Mapping[str, Any]]) -> list[Document]:
    """A row for each task, mode and metric, with every checkpoint's score and its 95 % interval."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in entries:
        low, high = entry["ci95"]
        score = f"{percent(entry['mean'])} ({100 * low:.1f} - {100 * high:.1f})"
        rows.setdefault((entry["task"], _asked(entry), entry["metric"]), {})[entry["checkpoint"]] = score
    return [
        {"task": task, "asked": asked, "metric": metric, "scores": scores}
        for (task, asked, metric), scores in rows.items()
    ]


def _divergences(path: Path) -> list[Document]:
    """Reverse KL to the teacher over a stage's first and last steps, for each stage and mode that has one."""
    rows = read_lines(path)
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        for mode in MODES:
            values = [
                value for row in rows if row["stage"] == stage and (value := row.get(f"{mode}.reverse_kl")) is not None
            ]
            if values:
                found.append(
                    {
                        "stage": stage,
                        "mode": MODE_NAMES[mode],
                        "first": fmean(values[:ENDS]),
                        "last": fmean(values[-ENDS:]),
                    }
                )
    return found


def _data(config: RunConfig) -> Iterator[str]:
    if isinstance(config.prompts, HubPrompts):
        for one in config.prompts.sets:
            yield f"[{one.id}](https://huggingface.co/datasets/{one.id}) at {one.revision[:12]}, licence {one.licence}"
    elif config.prompts.kind == "file":
        yield f"prompts of its maker's own ({Path(config.prompts.path).name})"
    else:
        yield f"the embedded arithmetic task, chains of 1 to {config.prompts.max_operations} operations"
