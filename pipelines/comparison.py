"""A comparison: chains of runs from the same starts, and what they come to.

    OUT/comparison.yaml                     the configuration
    OUT/<start>/off_policy-seed0/           a run of the off-policy stage: where the arms part
    OUT/<start>/<arm>-seed0/                a run of one arm from that start's student
    OUT/responses/<start>/<arm>-seed0/      the teacher's responses to that run alone: every arm pays for its own
    OUT/comparison.json                     what ``distill compare`` makes of them
    OUT/report.html

A chain is one start with one seed: off-policy, on-policy, then the two arms that depend on what on-policy spent. Each
member is a ``distill run`` in a process of its own, so an interrupted comparison goes on like an interrupted run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import interrupt
from distill.comparison import ArmSettings, ComparisonConfig
from distill.config import RunConfig
from distill.errors import UserError
from distill.journal import read_json, write_atomically, write_json
from distill.progress import say
from distill.recipe import dump_yaml, load_recipe, merge, validate, validate_as
from distill.run_folder import claim, refuse_other
from distill.stage_config import OffPolicyStage
from eval.compare import Arm, compare, read_curve, stage_flops
from eval.report import write_report
from pipelines.member import run_member
from pipelines.resolution import load_named

OFF_POLICY, ON_POLICY, RL, OFF_POLICY_MORE = "off_policy", "on_policy", "rl", "off_policy_more"
ARMS = (OFF_POLICY, ON_POLICY, RL, OFF_POLICY_MORE)
"""Each one's run has one stage, which bears its name, as does the checkpoint in tables."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a comparison."""

    start: str
    arm: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.start / f"{self.arm}-seed{self.seed}"


def members(config: ComparisonConfig) -> list[Member]:
    """All runs of a comparison."""
    return [Member(start, arm, seed) for start in config.starts for seed in config.seeds for arm in ARMS]


def member_config(config: ComparisonConfig, member: Member, root: Path, *, learned: Mapping[str, Any]) -> RunConfig:
    """The configuration of a member run; ``learned`` is what it takes from the runs before it.

    Raises UserError where the overlays do not make a valid configuration.
    """
    tree = merge(load_named(config.recipe), config.common)
    stages = tree.get("stages", {})
    off_policy = merge(stages.get("off_policy", {"kind": "off_policy"}), config.starts[member.start])
    on_policy = merge(stages.get("on_policy", {"kind": "on_policy"}), config.arms.on_policy.stage)
    # The student speaks in both, so what it is asked and how it is sampled is the same unless the arm says otherwise.
    shared: dict[str, Any] = {key: on_policy[key] for key in ("mixture", "sampling") if key in on_policy}
    arm, stage = {
        OFF_POLICY: (ArmSettings(), off_policy),
        ON_POLICY: (config.arms.on_policy, on_policy),
        RL: (config.arms.rl, {"kind": "grpo", **shared}),
        OFF_POLICY_MORE: (config.arms.off_policy_more, off_policy),
    }[member.arm]
    tree["stages"] = {member.arm: merge(stage, arm.stage)}
    overlay: dict[str, Any] = {"name": f"{member.start}-{member.arm}-seed{member.seed}", "seed": member.seed}
    if "store" not in tree:
        # Starts of one seed begin with the same questions, and an arm of one goes on where another start still is: in
        # a store that they share, who asks second would have for nothing what the first one paid for.
        overlay["store"] = str(member.folder(root.absolute() / "responses"))
    if member.arm != OFF_POLICY:
        student = Member(member.start, OFF_POLICY, member.seed).folder(root) / "student"
        overlay |= {
            "student": {"model": str(student.absolute())},
            # The teacher and the start are examined once, by the run that made the start; questions go on where it
            # stopped.
            "evaluation": {"references": False},
            "first_prompt": validate_as(OffPolicyStage, off_policy, where=f"the start {member.start!r}").num_prompts,
        }
    where = f"the {member.arm} run from {member.start!r} (recipe {config.recipe})"
    return validate(merge(merge(merge(tree, overlay), arm.run), learned), where=where)


def run_comparison(config: ComparisonConfig, out: Path) -> dict[str, Any]:
    """Run every member in ``out`` from wherever it stands; the comparison.

    Raises UserError for a configuration that no member could be made of (before anything runs), StoppedError where a
    signal asked to stop, DistillError where a member failed; the same call goes on from there.
    """
    runs = check(config, out)
    with _claimed(out, config):
        _announce(runs, out)
        _run_chains(config, out)
        return summarise(config, out)


def _announce(runs: Sequence[tuple[Member, RunConfig]], out: Path) -> None:
    """Say what the runs take that are not finished, as far as it is known before those they depend on have run."""
    from pipelines.forecast import announce_several, named_pair

    # All of a chain train the student that the first one begins with.
    pairs = {(member.start, member.seed): named_pair(config) for member, config in runs if member.arm == OFF_POLICY}
    unfinished = [one for one in runs if not (one[0].folder(out) / "summary.json").exists()]
    known = [(config, pair) for member, config in unfinished if (pair := pairs[member.start, member.seed]) is not None]
    if len(known) < len(unfinished):
        say("plan: the models' shapes are not known before they are opened; what each run takes is in its log")
        return
    announce_several(known)


def check(config: ComparisonConfig, out: Path) -> list[tuple[Member, RunConfig]]:
    """Every member with its configuration, as far as it is known before the members it depends on have run."""
    found = [
        (member, member_config(config, member, out, learned=_placeholder(member.arm))) for member in members(config)
    ]
    for _, run in found:
        run.check_teachers()
    if any(run.evaluation.curve is None for _, run in found):
        raise UserError(
            "common.evaluation.curve is null, and the arms are compared by their learning curves; set, for example, "
            "common.evaluation.curve={every: 10, keep_best: true}"
        )
    return found


def summarise(config: ComparisonConfig, out: Path) -> dict[str, Any]:
    """The comparison of the finished members, also written as ``comparison.json`` and ``report.html``.

    The document is the first start's, with all of them in ``starts``. Raises UserError where a member is not finished.
    """
    by_start = {
        start: compare(
            [Arm(arm, arm, tuple(Member(start, arm, seed).folder(out) for seed in config.seeds)) for arm in ARMS],
            headline=(ON_POLICY, RL),
        )
        for start in config.starts
    }
    document = {**next(iter(by_start.values())), "starts": by_start}
    write_json(out / "comparison.json", document)
    write_report(out)
    return document


def compare_folders(folders: Sequence[Path]) -> dict[str, Any]:
    """What ``distill compare`` says of finished runs, or of the members of one comparison.

    Runs that differ in their seed alone are one arm. Raises UserError for folders that cannot be compared.
    """
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} is not there; name the folder that --out of `distill run` named")
    if len(folders) == 1 and (folders[0] / "comparison.yaml").exists():
        file = folders[0] / "comparison.yaml"
        config = validate_as(ComparisonConfig, load_recipe(file), where=str(file))
        return summarise(config, folders[0])
    if len(set(folders)) < 2:
        raise UserError("a comparison needs two run directories or more, or the one of `distill run --recipe table21`")
    arms = _as_arms({folder: _config_of(folder) for folder in folders})
    judged = [[arm for arm, config in arms if _last_stage(config)[1].kind == kind] for kind in ("on_policy", "grpo")]
    seeds = [[config.seed for config in (_config_of(folder) for folder in arm.folders)] for arm, _ in arms]
    if any(other != seeds[0] for other in seeds):
        shown = "; ".join(f"{arm.name}: {found}" for (arm, _), found in zip(arms, seeds, strict=True))
        raise UserError(f"arms are paired seed by seed, and their seeds differ ({shown}); name runs of the same seeds")
    if len({_before_last(config) for _, config in arms}) > 1:
        say(
            "costs are those of each run's last stage, and the stages before it are not the same: add what those cost, "
            "and read compute and scores as of runs with different starts"
        )
    return compare([arm for arm, _ in arms], headline=_headline(*judged))


def _headline(ours: Sequence[Arm], theirs: Sequence[Arm]) -> tuple[str, str] | None:
    """The two arms whose compute is compared, where there is one of each and both have learning curves."""
    if len(ours) != 1 or len(theirs) != 1:
        return None
    pair = (ours[0], theirs[0])
    if not all((folder / "curve.jsonl").exists() for arm in pair for folder in arm.folders):
        return None
    return pair[0].name, pair[1].name


def _config_of(folder: Path) -> RunConfig:
    file = folder / "config.yaml"
    if not file.exists():
        raise UserError(f"{folder} is no run directory: it has no config.yaml; name the folder that --out named")
    return validate(load_recipe(file), where=str(file))


def _last_stage(config: RunConfig) -> tuple[str, Any]:
    return list(config.stages.items())[-1]


def _before_last(config: RunConfig) -> str:
    """The stages that lead to the last one."""
    return "".join(f"{name} {stage.model_dump_json()}\n" for name, stage in list(config.stages.items())[:-1])


def _as_arms(configs: Mapping[Path, RunConfig]) -> list[tuple[Arm, RunConfig]]:
    """Runs by arm, each arm's by seed; an arm is called like its first run's folder, with as much of the path before
    it as tells the arms apart."""
    groups: dict[str, dict[int, Path]] = {}
    for folder, config in configs.items():
        # Where things lie and what a run is called changes no number; a folder's student differs with the seed it has.
        blank: dict[str, Any] = {"name": None, "store": None, "seed": 0}
        if Path(config.student.model).is_dir():
            blank["student"] = config.student.model_copy(update={"model": "a folder"})
        same = groups.setdefault(config.model_copy(update=blank).model_dump_json(), {})
        if config.seed in same:
            raise UserError(
                f"{same[config.seed]} and {folder} are runs of the same configuration and seed; leave one out"
            )
        same[config.seed] = folder
    found = []
    names = _names([next(iter(by_seed.values())) for by_seed in groups.values()])
    for name, by_seed in zip(names, groups.values(), strict=True):
        folders = tuple(by_seed[seed] for seed in sorted(by_seed))
        config = configs[folders[0]]
        found.append((Arm(name, _last_stage(config)[0], folders), config))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each folder's path, as few as differ."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    shortened = ([os.path.join(*one[-num:]) for one in parts] for num in range(1, max(map(len, parts)) + 1))
    return next(names for names in shortened if len(set(names)) == len(folders))


def _placeholder(arm: str) -> dict[str, Any]:
    """What a member's configuration gets from other runs, as it could be."""
    return {"stop": {RL: {"score": 1.0, "flops": 1.0}}} if arm == RL else {}


def _run_chains(config: ComparisonConfig, out: Path) -> None:
    chains = [_Chain(config, out, start, seed) for seed in config.seeds for start in config.starts]
    parallel = min(config.parallel or _default_parallel(), len(chains))
    say(f"comparison: {len(members(config))} runs in {len(chains)} chains, {parallel} at a time, in {out}")
    stopping = threading.Event()
    threads = max(1, _num_cores() // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(chain.finish, stopping, threads) for chain in chains]
        try:
            while not all(future.done() for future in futures):
                interrupt.check()
                done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        finally:
            stopping.set()
            for future in futures:
                future.cancel()
    for future in futures:
        future.result()


class _Chain:
    """One start with one seed: four runs, one after the other."""

    def __init__(self, config: ComparisonConfig, root: Path, start: str, seed: int) -> None:
        self.config, self.root, self.start, self.seed = config, root, start, seed

    def finish(self, stopping: threading.Event, threads: int) -> None:
        for arm, learned in (
            (OFF_POLICY, dict),
            (ON_POLICY, dict),
            (OFF_POLICY_MORE, self._as_many_questions),
            (RL, self._until_caught_up),
        ):
            if stopping.is_set():
                return
            member = Member(self.start, arm, self.seed)
            folder = member.folder(self.root)
            if not (folder / "summary.json").exists():
                run_member(
                    member_config(self.config, member, self.root, learned=learned()),
                    folder,
                    stopping,
                    threads=threads,
                )

    def _folder(self, arm: str) -> Path:
        return Member(self.start, arm, self.seed).folder(self.root)

    def _until_caught_up(self) -> dict[str, Any]:
        """RL goes on until it scores what on-policy scored on the validation questions, or has spent its allowance."""
        best = max(point.score for point in read_curve(self._folder(ON_POLICY), ON_POLICY))
        flops = self.config.rl_flops * stage_flops(self._folder(ON_POLICY), ON_POLICY)
        return {"stop": {RL: {"score": best, "flops": flops}}}

    def _as_many_questions(self) -> dict[str, Any]:
        """As many fresh questions as the on-policy arm's FLOPs pay for, by what one of the start's cost."""
        num_asked = len(read_json(self._folder(OFF_POLICY) / "manifest.json")["stages"][OFF_POLICY]["responses"])
        per_question = stage_flops(self._folder(OFF_POLICY), OFF_POLICY) / num_asked
        wanted = stage_flops(self._folder(ON_POLICY), ON_POLICY) / per_question
        return {"stages": {OFF_POLICY_MORE: {"num_prompts": max(1, round(wanted))}}}


@contextmanager
def _claimed(out: Path, config: ComparisonConfig) -> Iterator[None]:
    """The folder for this process alone, holding this comparison or none."""
    lock = claim(out, marker="comparison.yaml")
    try:
        file = out / "comparison.yaml"
        if file.exists():
            refuse_other(file, config)
        else:
            write_atomically(file, dump_yaml(config))
        yield
    finally:
        lock.close()


def _default_parallel() -> int:
    import torch

    return 1 if torch.cuda.is_available() else _num_cores()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
