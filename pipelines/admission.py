"""The preflight as a run makes it: what is checked when, shown line by line, and recorded.

Files are compared before anything is spent. Then the teachers are asked: at once where that starts no server only to
end it again, else (one's own server generates, and another one will judge) with responses that are drawn while the
first is up, and before the first gradient. A stage that learns from stored responses has some of them checked too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from distill.checkpoint import Checkpoint, load_tokenizer
from distill.config import RunConfig
from distill.encode import Encoder
from distill.prompts import PromptSource
from distill.types import Rollout
from pipelines.crew import Stage
from pipelines.faculty import Candidate, Faculty, Tutor
from pipelines.preflight import Finding, check_pair, shown, skipped
from pipelines.probes import NUM_PROBES, PROBES, Probe, ask_teacher, probe_requests
from pipelines.stages import STAGES
from teachers.store import ResponseStore, response_key

STORE = "the response store"
NUM_STORED = 8
"""Responses of a stage that are checked before it learns from them."""

_NOT_WANTED = "not asked: no stage has the teacher judge, and the run's own server speaks from the checkpoint itself"


class Admission:
    """All checks of one run; ``record`` is called whenever there are new findings."""

    def __init__(self, config: RunConfig, student: Checkpoint, store: ResponseStore) -> None:
        self.config, self.student, self.store = config, student, store
        self.findings: list[Finding] = []
        self.record: Callable[[], None] = lambda: None
        self._said: dict[str, dict[str, Sequence[Rollout]]] = {}
        self._asked: set[str] = set()

    def compare(self, candidates: Sequence[Candidate]) -> None:
        """Every teacher with the student, by their files. Raises UserError at the first check that fails."""
        config, settings = self.config, self.config.preflight
        is_taught = any(STAGES[type(stage)].teacher_part for stage in config.stages.values())
        default = load_tokenizer(candidates[0].checkpoint)
        for candidate in candidates:
            tokenizer = load_tokenizer(candidate.checkpoint)
            asked = {"student": config.student_says_one_more, "teacher": self._says_one_more(candidate)}
            self._add(
                check_pair(
                    candidate.checkpoint,
                    tokenizer,
                    self.student,
                    load_tokenizer(self.student),
                    template=default,
                    max_prompt_tokens=config.max_prompt_tokens,
                    max_new_tokens=config.longest_response,
                    same_weights_allowed=settings.same_weights or not is_taught,
                    one_more=[who for who, is_asked in asked.items() if is_asked],
                    modes=config.modes,
                    skip=settings.skip,
                )
            )

    def draw(self, faculty: Faculty, prompts: PromptSource, encoder: Encoder, *, taking_turns: bool) -> None:
        """Have the teachers speak whose servers take turns, or those of the others."""
        for tutor in faculty.tutors:
            if tutor.hired.takes_turns is taking_turns:
                self._draw(tutor, prompts, encoder)

    def ask_at_once(self, faculty: Faculty) -> None:
        """Ask every teacher that can judge and speak without its servers changing over, and has spoken.

        No process stores a response before all have drawn theirs: they ask about the same ones.
        """
        for tutor in faculty.tutors:
            if not tutor.hired.takes_turns:
                self._ask(tutor)

    def ask_before_steps(self, stage: Stage, stages: Sequence[Stage], faculty: Faculty) -> None:
        """Whatever is left to ask before ``stage`` takes its first step in this process."""
        for tutor in faculty.tutors:
            if tutor.name in self._asked:
                continue
            if is_judge_wanted(stages):
                self._ask(tutor)
            else:
                self._asked.add(tutor.name)
                self._add([skipped(name, tutor.name, _NOT_WANTED) for name in PROBES])
        spoken = list(stage.spoken())
        for tutor, places in faculty.groups([rollout.request.prompt for rollout in spoken]):
            if tutor.hired.takes_turns and not is_judge_wanted(stages):
                continue
            chosen = places[:: max(1, len(places) // NUM_STORED)][:NUM_STORED]
            probe = self._probe(tutor, {f"stage {stage.name}": [spoken[place] for place in chosen]})
            self._add(ask_teacher(probe, names=("responses",), skip=self.config.preflight.skip))

    def _draw(self, tutor: Tutor, prompts: PromptSource, encoder: Encoder) -> None:
        """Responses for the probes: what is stored, and where nothing is or somebody else speaks, fresh ones."""
        limit = self.config.longest_response
        requests = probe_requests(prompts.batch(0, NUM_PROBES), encoder, max_new_tokens=limit)
        keys = [response_key(tutor.identity, request) for request in requests]
        kept = self.store.get(tutor.identity, requests)
        said: dict[str, Sequence[Rollout]] = {}
        if all(key in kept for key in keys):
            said[STORE] = [kept[key].rollout for key in keys]
        for where in tutor.hired.spoken_at:
            if where in tutor.hired.foreign or not said:
                said[where] = tutor.hired.speak_at(where, requests)
        self._said[tutor.name] = said

    def _ask(self, tutor: Tutor) -> None:
        self._asked.add(tutor.name)
        said = self._said[tutor.name]
        self._add(ask_teacher(self._probe(tutor, said), skip=self.config.preflight.skip))
        if "responses" not in self.config.preflight.skip:
            # Only now: responses of another model have no place in this teacher's store.
            self.store.put(tutor.identity, next(iter(said.values())))

    def _probe(self, tutor: Tutor, said: dict[str, Sequence[Rollout]]) -> Probe:
        longest = self.config.max_prompt_tokens + self.config.longest_response
        needed = longest + int(self._says_one_more(tutor.candidate))
        return Probe(tutor.candidate.checkpoint, tutor.hired, said, needed)

    def _says_one_more(self, candidate: Candidate) -> bool:
        return self.config.teacher_says_one_more(candidate.settings)

    def _add(self, findings: Iterable[Finding]) -> None:
        # One by one: what passed before the check that fails is shown too.
        for finding in shown(findings, self.student.name):
            self.findings.append(finding)
        self.record()

    def manifest(self) -> list[dict[str, Any]]:
        """What the run's manifest keeps."""
        return [asdict(finding) for finding in self.findings]


def is_judge_wanted(stages: Sequence[Stage]) -> bool:
    """Whether any stage has the teacher judge."""
    return any(stage.teacher_part == "judges" for stage in stages)
