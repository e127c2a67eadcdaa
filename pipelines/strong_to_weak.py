"""A whole run: examine the teacher and the start, run the stages, examine after each, report.

One example's way through it: a prompt is rendered by the teacher's template, answered (by the teacher or the student),
judged (by nobody or the teacher), felt as a loss at the rows that predict the response, and shows up in a line of
metrics.jsonl, a bar of the cost account and, through the student it changed, in the scores of the report.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.adapters import check_adapters
from distill.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from distill.config import RunConfig
from distill.encode import Encoder
from distill.errors import GoneError, UserError
from distill.family import ModelSource, resolve, shape_of
from distill.journal import Journal, read_json, write_json
from distill.progress import be_silent, say
from distill.prompts import load_prompts
from distill.sampler import OnFinished, Sampler
from distill.seeding import derive
from distill.stage_config import StageSettings
from distill.types import Request, Rollout
from eval.report import write_report
from pipelines.admission import Admission, is_judge_wanted
from pipelines.batches import batches_of
from pipelines.crew import Crew, Stage
from pipelines.curve import Curve
from pipelines.faculty import Candidate, Faculty, check_domains, find_teachers, hired_faculty
from pipelines.forecast import announce, named_pair
from pipelines.guards import Guards
from pipelines.layouts import Pair
from pipelines.loop import run_stage
from pipelines.meter import Meter
from pipelines.phases import Clock, devices_of
from pipelines.processes import choose_engine
from pipelines.savepoints import Position, Savepoints
from pipelines.scores import Scores
from pipelines.specimens import Specimens
from pipelines.stages import STAGES
from pipelines.student_sampling import check_sampler, student_sampler
from pipelines.tracker import TrackedRun, check_tracker, tracking
from students.optimiser import eight_bit_adamw
from students.ranks import ALONE, Ranks
from students.rescoring import most_probable
from students.shared_sampler import with_all_samplers
from students.student import Student
from teachers.store import made_store


def run(config: RunConfig, out: Path, *, command: Sequence[str], ranks: Ranks = ALONE) -> dict[str, Any]:
    """Run ``config`` in the run directory ``out``, from wherever it stands; the summary.

    Every process of ``ranks`` calls it, with the same directory: one writes, all read. A finished run only gives back
    its summary. Raises UserError for a configuration or input that cannot work, StoppedError where a signal asked to
    stop, DistillError for what failed on the way; all leave a run that the same call resumes.
    """
    if not ranks.is_main:
        be_silent()
    with ranks.together():
        if ranks.is_main:
            check_tracker(config.tracker)
        journal = Journal(out, config) if ranks.is_main else Journal(out, config, writes=False)
    try:
        if journal.finished:
            if ranks.is_main and not (out / "report.html").exists():
                write_report(out)
            # It may have been moved since.
            return {**read_json(out / "summary.json"), "run": str(out)}
        with ExitStack() as stack:
            return _Run(config, journal, command, stack, ranks).finish()
    finally:
        journal.close()


class _Run:
    """The parts of one run, put together once. What has to be ended with the run is entered into ``stack``."""

    def __init__(
        self, config: RunConfig, journal: Journal, command: Sequence[str], stack: ExitStack, ranks: Ranks
    ) -> None:
        self.config, self.journal, self.ranks, self.stack = config, journal, ranks, stack
        hosts = ranks.hosts()
        with ranks.together():
            config.check_processes(ranks.count)
            config.check_teachers()
            if config.student.adamw == "8bit":
                # It is made when everything has been examined and sampled: too late to learn that there is none.
                eight_bit_adamw(ranks.device)
            named = named_pair(config)
            if named is not None and ranks.is_main:
                announce(config, named, journal, ranks, hosts)
            candidates, student = self._open()
            if named is None and ranks.is_main:
                announce(config, Pair(candidates[0].checkpoint.shape, student.shape), journal, ranks, hosts)
            _check_shared_servers(config, ranks)
            check_sampler(config, student, ranks)
            self.teacher_shape = candidates[0].checkpoint.shape
            self.engine = choose_engine(config, student.shape, ranks, self.teacher_shape)
            teachers = stack.enter_context(
                hired_faculty(
                    config,
                    candidates,
                    self.encoder,
                    device=ranks.device,
                    logs=journal.path / "servers",
                    choose=self._choose,
                )
            )
            # What is sharded moves to the device layer by layer.
            place = torch.device("cpu") if self.engine == "sharded" else ranks.device
            model = load_model(student, getattr(torch, config.student.dtype), place)
        self.student = Student(model, config.student, stop_ids=self.encoder.stop_ids, ranks=ranks, engine=self.engine)
        with ranks.together():
            self.admission.draw(teachers, self.prompts, self.encoder, taking_turns=False)
        with self.student.whole(), ranks.together():
            self.admission.ask_at_once(teachers)
            self._write_manifest(candidates, student, command)
            self.tracking = stack.enter_context(tracking(config.tracker if ranks.is_main else None, self._tracked))
            self.admission.record = self._record_admission
        self.crew = self._assemble(teachers, student)
        self.savepoints = Savepoints(journal, self.student, self.crew.meter, ranks, export=self._export)
        self.stages: list[Stage] = []
        first_prompt = config.first_prompt
        for name, settings in config.stages.items():
            self.stages.append(STAGES[type(settings)](name, settings, self.crew, first_prompt=first_prompt))
            first_prompt += self.stages[-1].num_prompts
        self.curve = None if config.evaluation.curve is None else Curve(config, self.crew, journal, self.scores.tasks)

    def _open(self) -> tuple[list[Candidate], Checkpoint]:
        """The teachers' and the student's checkpoints, with all that is read and checked before any is loaded."""
        config = self.config
        torch.manual_seed(derive(config.seed, "torch"))
        # Names first: a misspelt student, or a module of it, should not be noticed after a teacher's download.
        source = resolve(config.student.model, role="student", revision=config.student.revision)
        check_adapters(config.student, shape_of(config.student.model))
        candidates = find_teachers(config)
        student = open_checkpoint(source)
        check_adapters(config.student, student.shape)
        self.store = made_store(config.store)
        self.admission = Admission(config, student, self.store)
        self.admission.compare(candidates)
        self.encoder = Encoder(load_tokenizer(candidates[0].checkpoint))
        self.prompts = load_prompts(
            config.prompts,
            seed=config.seed,
            max_prompt_tokens=config.max_prompt_tokens,
            count_tokens=self.encoder.count_tokens,
        )
        check_domains(candidates, self.prompts.domains)
        self.scores = Scores(config, self.prompts.held_out())
        self.scores.say_trained(self.prompts)
        return candidates, student

    def _write_manifest(self, candidates: Sequence[Candidate], student: Checkpoint, command: Sequence[str]) -> None:
        specialists = {one.label: _identified(one.checkpoint) for one in candidates[1:]}
        packages = ("torch", "transformers", "tokenizers", "datasets", "peft", "numpy")
        self.journal.manifest(
            {
                "command": shlex.join(command),
                "seed": self.config.seed,
                "teacher": _identified(candidates[0].checkpoint),
                **({"specialists": specialists} if specialists else {}),
                "student": _identified(student),
                "prompts": self.prompts.content_hash,
                "preflight": self.admission.manifest(),
                "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
                "machine": {
                    "processor": platform.machine(),
                    "threads": torch.get_num_threads(),
                    "processes": self.ranks.count,
                },
            }
        )

    def _tracked(self) -> TrackedRun:
        path = self.journal.path
        return TrackedRun(
            name=str(self.config.name),
            id=read_json(path / "manifest.json")["id"],
            folder=path,
            config=self.config.model_dump(mode="json"),
            num_shown=self.journal.num_recorded,
        )

    def _record_admission(self) -> None:
        self.journal.manifest({"preflight": self.admission.manifest()})

    def _assemble(self, teachers: Faculty, student: Checkpoint) -> Crew:
        config, ranks = self.config, self.ranks
        if ranks.count > 1:
            say(f"{ranks.count} processes, the student {self.engine}")

        def start_of(stage: str) -> PreTrainedModel:
            number = list(config.stages).index(stage)
            begun = student if number == 0 else self._stage_end(list(config.stages)[number - 1])
            return load_model(begun, self.student.dtype, ranks.device)

        crew = Crew(
            encoder=self.encoder,
            teachers=teachers,
            student=self.student,
            student_sampler=self.stack.enter_context(
                student_sampler(
                    config,
                    student,
                    self.student,
                    self.encoder,
                    ranks,
                    teacher=self.teacher_shape,
                    logs=self.journal.path / "servers",
                )
            ),
            student_shape=student.shape,
            start_of=start_of,
            prompts=self.prompts,
            store=self.store,
            meter=Meter(),
            seed=config.seed,
            run_id=read_json(self.journal.path / "manifest.json")["id"],
            ranks=ranks,
        )
        return crew

    def _stage_end(self, stage: str) -> Checkpoint:
        """The student that the stage of this name left."""
        folder = self.journal.stage_end(stage)
        return open_checkpoint(ModelSource(stage, "directory", str(folder)))

    def _choose(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """The ids that the student asks its teacher about."""
        return most_probable(self.student, rollouts, self.config.teacher.top_k)

    def finish(self) -> dict[str, Any]:
        """Everything that is still to do; the summary."""
        with self.ranks.together():
            position = self.savepoints.resume()
        if self.config.evaluation.references:
            self._examine("teacher", self.crew.teachers.default.hired.speaker)
        if position.stage < len(self.stages) and is_judge_wanted(self.stages):
            with self.ranks.together():
                self.admission.draw(self.crew.teachers, self.prompts, self.encoder, taking_turns=True)
        if self.config.evaluation.references:
            self._examine("start", self._student_at(position, Position()))
        for number, (stage, settings) in enumerate(zip(self.stages, self.config.stages.values(), strict=True)):
            if number >= position.stage:
                position = self._run_stage(number, stage, settings, position)
            self._examine(stage.name, self._student_at(position, Position(number + 1)))
        weights = self.student.weights()
        with self.ranks.together():
            self.journal.write_folder(self.journal.path / "student", partial(self._export, weights=weights))
            return self._summarise() if self.ranks.is_main else {}

    def _student_at(self, position: Position, wanted: Position) -> Sampler:
        """The student's sampler if its weights are those of ``wanted``; on a resumed run they may be further on."""
        if (position.stage, position.step) == (wanted.stage, wanted.step):
            return self.crew.student_sampler
        return _TrainedOn()

    def _run_stage(self, number: int, stage: Stage, settings: StageSettings, position: Position) -> Position:
        """Run the stage from ``position`` to its end."""
        stage.prepare()
        self.savepoints.write_costs()
        with self.student.whole(), self.ranks.together():
            self.admission.ask_before_steps(stage, self.stages, self.crew.teachers)
        self.journal.manifest({"stages": {**self._manifest_stages(), stage.name: stage.manifest()}})
        self.student.begin(settings.optimiser)
        self.savepoints.give_back_moments()
        before = position.global_step - position.step

        guards = Guards(
            self.config.guards,
            stage=stage.name,
            checkpoints=self.journal.path / "checkpoints",
            history=self.journal.metrics_of(stage.name),
            record=self.journal.record_warning,
        )

        specimens = Specimens(self.crew, self.journal)

        def checkpoint(done: int, stage_end: bool) -> None:
            if stage_end:
                if self.curve is not None:
                    self.curve.settle(stage, self.student)
                self.student.end()
            self.savepoints.write(Position(number, done, before + done), stage.name, stage_end=stage_end)
            if self.curve is not None:
                self.curve.tidy(stage)

        def examine(done: int) -> bool:
            ends = self.curve is not None and self.curve.ends(stage, done, before + done, self.student)
            if ends or done in (0, stage.num_steps):
                specimens.take(stage, settings, step=done, global_step=before + done)
            return ends

        self.crew.student_sampler.weight_version = position.global_step
        done = run_stage(
            stage,
            self.student,
            self.crew,
            self.journal,
            first_step=position.step,
            global_step=position.global_step,
            checkpoint=checkpoint,
            checkpoint_every=self.config.checkpoint_every,
            guards=guards,
            tracking=self.tracking,
            examine=examine,
            batches=batches_of(stage, self.crew, staleness=self.config.sampler.staleness),
            clock=Clock(devices_of(self.config, self.ranks.count, teacher_judges=stage.teacher_part == "judges")),
        )
        return Position(number + 1, 0, before + done)

    def _manifest_stages(self) -> dict[str, Any]:
        return dict(read_json(self.journal.path / "manifest.json").get("stages", {}))

    def _export(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """The student as a plain checkpoint, with the teacher's tokenizer and chat template."""
        self.student.export(folder, weights)
        self.encoder.tokenizer.save_pretrained(folder)

    def _examine(self, checkpoint: str, sampler: Sampler) -> None:
        with self.student.whole():
            with_all_samplers(self.ranks, sampler, partial(self._evaluate_all, checkpoint))

    def _evaluate_all(self, checkpoint: str, sampler: Sampler) -> None:
        """Every evaluation of one checkpoint; on the main process."""
        self.scores.examine(checkpoint, sampler, self.crew, self.journal.path / "eval")
        self.savepoints.write_costs()

    def _summarise(self) -> dict[str, Any]:
        summary = {
            "run": str(self.journal.path),
            **self.scores.summary([stage.name for stage in self.stages]),
            "costs": self.crew.meter.account.to_json(),
            "peak_memory_bytes": self.crew.meter.account.peak_bytes,
        }
        # Before the summary, whose presence says that nothing is left to do.
        self.tracking.scores(summary, self.journal.num_recorded)
        write_json(self.journal.path / "summary.json", summary)
        write_report(self.journal.path)
        return summary


class _TrainedOn:
    """Stands where a checkpoint's scores must be on disk already, because its weights have been trained on."""

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        raise GoneError(
            "scores of an earlier checkpoint are missing from the run's eval folder, and its weights have been trained "
            "on; restore the folder, or give another --out"
        )


def _check_shared_servers(config: RunConfig, ranks: Ranks) -> None:
    """One process starting a server on devices that the others train on would start it under them."""
    teachers = {"teacher": config.teacher}
    teachers |= {f"specialists.{domain}": settings for domain, settings in config.specialists.items()}
    for where, settings in teachers.items():
        if ranks.count > 1 and settings.backend == "vllm" and not (settings.urls.score and settings.urls.generate):
            raise UserError(
                f"{ranks.count} processes share a teacher behind vLLM, and it is not named; start its servers with "
                f"`distill teacher serve` (both roles) and set {where}.urls.generate and {where}.urls.score"
            )


def _identified(checkpoint: Checkpoint) -> dict[str, str]:
    return {"name": checkpoint.source.location, "revision": checkpoint.revision}
