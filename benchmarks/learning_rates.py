"""The sweep behind the embedded recipes' learning rates: ``python -m benchmarks.learning_rates --out DIR [--json]``.

Each rate of the off-policy stage is run with every seed from the shipped student; each rate of the on-policy and the
GRPO stage with every seed from the off-policy student of the recipe's own rate. A run is a plain ``distill run`` in
DIR, so that an interrupted sweep goes on where it was. Prints one JSON document: thinking and non-thinking scores by
rate and seed, and what the stage cost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run


def scores(summary: dict[str, Any], checkpoint: str) -> dict[str, float]:
    """Mean score by mode."""
    return {entry["mode"]: entry["mean"] for entry in summary["scores"] if entry["checkpoint"] == checkpoint}


def spent(summary: dict[str, Any]) -> dict[str, float]:
    """Tokens that the student sampled, and FLOPs of everything but the examinations."""
    costs = summary["costs"]
    flops = sum(cost["flops"] for role, cost in costs.items() if role != "evaluate")
    return {"sampled_tokens": costs["student_sample"]["tokens"], "flops": flops}


def one(
    out: Path, stage: str, rate: float | None, seed: int, *, student: Path | None, more: list[str]
) -> dict[str, Any]:
    """A run of one stage alone, at ``rate`` (None: the recipe's)."""
    recipe = resolve_run(recipe="embedded-grpo" if stage == "grpo" else "embedded")
    settings = recipe.stages[stage].model_dump(mode="json")
    if rate is not None:
        settings["optimiser"]["learning_rate"] = rate
    # What overrides another stage is none of this run's business.
    mine = [text for text in more if not text.startswith("stages.") or text.startswith(f"stages.{stage}.")]
    config = resolve_run(
        student=None if student is None else str(student),
        recipe="embedded",
        seed=seed,
        assignments=[f"stages={json.dumps({stage: settings})}", *mine],
    )
    # `stages` was laid over the recipe's; only the stage that is examined may stay.
    config = config.model_copy(update={"stages": {stage: config.stages[stage]}})
    return run(config, out, command=["python", "-m", "benchmarks.learning_rates"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--off-policy", type=float, nargs="*", default=[1e-3, 2e-3, 3e-3])
    parser.add_argument("--on-policy", type=float, nargs="*", default=[3e-4, 1e-3, 2e-3])
    parser.add_argument("--grpo", type=float, nargs="*", default=[5e-5, 1e-4, 3e-4])
    parser.add_argument("--set", dest="more", action="append", default=[], help="override one key of every run")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented document")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"off_policy": {}, "on_policy": {}, "grpo": {}}
    for rate in arguments.off_policy:
        results = []
        for seed in arguments.seeds:
            out = arguments.out / f"off-{rate:g}-seed{seed}"
            summary = one(out, "off_policy", rate, seed, student=None, more=arguments.more)
            results.append(scores(summary, "off_policy"))
        document["off_policy"][rate] = results
    for stage, short, rates in (("on_policy", "on", arguments.on_policy), ("grpo", "grpo", arguments.grpo)):
        for rate in rates:
            results = []
            for seed in arguments.seeds:
                start = arguments.out / f"start-seed{seed}"
                one(start, "off_policy", None, seed, student=None, more=arguments.more)
                out = arguments.out / f"{short}-{rate:g}-seed{seed}"
                summary = one(out, stage, rate, seed, student=start / "student", more=arguments.more)
                ends = {"start": scores(summary, "start"), "end": scores(summary, stage)}
                results.append({**ends, **spent(summary)})
            document[stage][rate] = results
    print(json.dumps(document, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
