"""What the teacher says and which divergence is felt: ``python -m benchmarks.ablations --comparison DIR --out DIR``.

From the starts of a finished comparison (``distill run --recipe table21 --out DIR``), with each of its seeds, the
comparison's on-policy stage with one thing changed: the divergence, or the signal (k most probable tokens with or
without a tail, or the sampled token alone). A run is a plain run in OUT/<variant>-seed<n>, so that an interrupted
ablation goes on where it was; guards are off, so that what goes wrong is scored too. Prints the comparison of the
variants as JSON (``eval.compare``): scores over the seeds and paired differences to the exact reverse KL.

A top-k sum without its tail is no divergence, and no run can be configured to use it; it is patched in here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pipelines.losses
from distill.comparison import ComparisonConfig
from distill.config import GuardSettings, RunConfig
from distill.recipe import load_recipe, merge, validate, validate_as
from distill.sparse import linear_topk_divergence
from eval.compare import Arm, compare
from pipelines.comparison import ON_POLICY, Member, member_config
from pipelines.strong_to_weak import run

REFERENCE = "reverse_kl"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "forward_kl": {"divergence": {"kind": "forward_kl"}},
    "jsd": {"divergence": {"kind": "jsd"}},
    **{f"top{k}": {"teacher": {"signal": "topk", "top_k": k}} for k in (1, 4, 16)},
    **{f"top{k}_no_tail": {"teacher": {"signal": "topk", "top_k": k}} for k in (1, 4, 16)},
    "sampled": {"teacher": {"signal": "sampled"}, "divergence": {"merge_stop_ids": False}},
}


@contextmanager
def without_tail(is_wanted: bool) -> Iterator[None]:
    """Within the block, a top-k signal is felt as the plain sum over its tokens."""
    whole = pipelines.losses.linear_topk_divergence
    if is_wanted:
        pipelines.losses.linear_topk_divergence = partial(linear_topk_divergence, tail=False)
    try:
        yield
    finally:
        pipelines.losses.linear_topk_divergence = whole


def configured(config: ComparisonConfig, root: Path, start: str, seed: int, variant: str) -> RunConfig:
    """The comparison's on-policy run with the variant laid over it; examined at its end, in thinking mode."""
    tree = member_config(config, Member(start, ON_POLICY, seed), root, learned={}).model_dump(mode="json")
    changed = VARIANTS[variant]
    over: dict[str, Any] = {
        "teacher": changed.get("teacher", {}),
        "stages": {ON_POLICY: {"divergence": changed.get("divergence", {})}},
        "guards": dict.fromkeys(set(GuardSettings.model_fields) - {"window"}),
        "evaluation": {"curve": None, "pass_at": None, "modes": ["think"], "samples": 1},
    }
    return validate(merge(tree, over), where=f"the variant {variant}")


def ablate(root: Path, out: Path, start: str, variants: Sequence[str]) -> dict[str, Any]:
    """The comparison of ``variants``, each run made first where it is not there yet."""
    config = validate_as(ComparisonConfig, load_recipe(root / "comparison.yaml"), where=str(root / "comparison.yaml"))
    arms = []
    for variant in variants:
        folders = []
        for seed in config.seeds:
            folders.append(out / f"{variant}-seed{seed}")
            with without_tail(variant.endswith("_no_tail")):
                run(configured(config, root, start, seed, variant), folders[-1], command=["benchmarks.ablations"])
        arms.append(Arm(variant, ON_POLICY, tuple(folders)))
    document = compare(arms)
    return {
        "start": start,
        "seeds": document["seeds"],
        "arms": document["arms"],
        "paired": [entry for entry in document["paired"] if entry["b"] == REFERENCE],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", default="low")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", action="store_true", help="one line instead of an indented document")
    arguments = parser.parse_args()
    document = ablate(arguments.comparison, arguments.out, arguments.start, arguments.variants)
    print(json.dumps(document, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
