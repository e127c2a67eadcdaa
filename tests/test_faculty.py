"""Several teachers: each response is answered, judged and felt by the teacher of its prompt's domain, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoint import load_model, load_tokenizer, open_checkpoint
from distill.config import RunConfig
from distill.costs import CostAccount
from distill.embedded import checkpoint_dir
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import resolve
from distill.model_config import StudentSettings
from distill.sampler import TransformersSampler
from distill.types import Prompt, Rollout, Sampling
from pipelines.crew import Crew
from pipelines.faculty import Faculty, find_teachers, hired_faculty
from pipelines.meter import Meter
from pipelines.resolution import resolve_run
from pipelines.stages import OnPolicy
from pipelines.strong_to_weak import run
from students.batch import collate, micro_batches
from students.student import Student

CPU = torch.device("cpu")
ENCODER = Encoder(load_tokenizer(open_checkpoint(resolve("tiny", role="teacher"))))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher: the embedded one with every weight a little off, its head too."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(checkpoint_dir("tiny"), folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    changed = {name: value + 0.1 * value.std() * torch.randn_like(value) for name, value in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def revision_with(*assignments: str) -> str:
    return find_teachers(resolve_run(assignments=assignments))[0].identity(ENCODER).revision


def test_responses_are_stored_under_all_that_makes_the_weights_another_model() -> None:
    """Two runs that load the same weights in different ways have not the same responses, and never share them."""
    own, behind = "teacher.dtype=bfloat16", "teacher.backend=vllm"
    checkpoint = find_teachers(resolve_run())[0].checkpoint
    assert checkpoint.dtype == "bfloat16"
    assert revision_with(own) == revision_with(own, behind) == checkpoint.revision
    assert revision_with("teacher.dtype=float32") == checkpoint.revision + "+float32"
    assert revision_with(own, behind, "teacher.quantization=fp8") == checkpoint.revision + "+fp8"
    words = "teacher.server_args=[--kv_cache-dtype=fp8, --max-num-seqs, '8', --hf-overrides, '{}', --enforce-eager]"
    assert revision_with(own, behind, words) == checkpoint.revision + "+--hf-overrides {}+--kv-cache-dtype fp8"
    # What only servers are told says nothing about a model in this process.
    assert revision_with(own, words, "teacher.quantization=fp8") == checkpoint.revision


def config_with(other: Path, *assignments: str) -> RunConfig:
    return resolve_run(assignments=[f"specialists.sums={{model: {other}, dtype: float32}}", *assignments])


def _nobody(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    raise AssertionError("the whole distribution is asked for")


@pytest.fixture(scope="module")
def faculty(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = config_with(other)
    logs = tmp_path_factory.mktemp("logs")
    with hired_faculty(config, find_teachers(config), ENCODER, device=CPU, logs=logs, choose=_nobody) as faculty:
        yield faculty


def mixed_rollouts(model: Any) -> list[Rollout]:
    """Responses of unlike length; every second prompt is the specialist's, one more has a domain without one."""
    domains = ("sums", None, "sums", "poems", None, "sums")
    requests = [
        ENCODER.request(
            Prompt(({"role": "user", "content": f"{number}+7*{number}="},), domain=domain),
            mode="think" if number % 3 else "no_think",
            sampling=Sampling(8 + 5 * number),
            seed=number,
        )
        for number, domain in enumerate(domains)
    ]
    return TransformersSampler(model, ENCODER, speaker="student").generate(requests)


def naive_losses(rollouts: list[Rollout], student: Any, teachers: dict[str | None, Any]) -> list[float]:
    """Reverse KL of each response token in float64, one response at a time, whole models end to end."""
    found = []
    stops = list(ENCODER.stop_ids)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        first = len(rollout.prompt_ids) - 1
        rows = slice(first, first + len(rollout.response_ids))
        teacher = teachers.get(rollout.request.prompt.domain, teachers[None])
        p, q = (model(ids).logits[0, rows].double().softmax(-1) for model in (student, teacher))
        p, q = (
            torch.cat([x[:, [i for i in range(x.shape[1]) if i not in stops]], x[:, stops].sum(-1, True)], dim=1)
            for x in (p, q)
        )
        found += (p * (p.log() - q.log())).sum(-1).tolist()
    return found


def on_policy(faculty: Faculty, **options: Any) -> OnPolicy:
    crew = Crew(
        encoder=ENCODER,
        teachers=faculty,
        meter=Meter(),
        **dict.fromkeys(  # type: ignore[arg-type]
            ("student", "student_sampler", "student_shape", "start_of", "prompts", "store"), None
        ),
        seed=0,
        run_id="",
    )
    settings = resolve_run().stages["on_policy"]
    return OnPolicy("on_policy", settings, crew, first_prompt=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_batch_tokens", [None, 64])
def test_every_row_is_felt_against_its_own_teachers_distribution(
    faculty: Faculty, other: Path, micro_batch_tokens: int | None
) -> None:
    model = load_model(open_checkpoint(resolve("nano", role="student")), torch.float32, "cpu")
    rollouts = mixed_rollouts(model)
    reference = {
        None: load_model(open_checkpoint(resolve("tiny", role="teacher")), torch.float32, "cpu"),
        "sums": load_model(open_checkpoint(resolve(str(other), role="teacher")), torch.float32, "cpu"),
    }
    with torch.no_grad():
        expected = naive_losses(rollouts, model, reference)
        exchanged = naive_losses(rollouts, model, {None: reference["sums"], "sums": reference[None]})
    mean, wrong = (sum(values) / len(values) for values in (expected, exchanged))
    assert abs(mean - wrong) > 0.01, "a wrong routing would not be noticed"

    stage = on_policy(faculty)
    (examples,) = stage.signal(rollouts).updates
    settings = StudentSettings(
        dtype="float32", gradient_checkpointing=False, micro_batch_tokens=micro_batch_tokens, model="nano"
    )
    student = Student(model, settings, stop_ids=ENCODER.stop_ids)
    by_row: dict[tuple[int, int], float] = {}
    for group in micro_batches(examples, micro_batch_tokens):
        rows, _ = student.rows(collate(group, CPU))
        felt = iter(stage.loss(rows).per_token_N["reverse_kl"].tolist())
        for example in group:
            place = rollouts.index(example.rollout)
            by_row |= {(place, row): next(felt) for row in range(len(example.rollout.response_ids))}
    assert [by_row[key] for key in sorted(by_row)] == pytest.approx(expected, abs=2e-4)
    # The denominator is the step's, whatever the teachers: the mean over all tokens, not a mean of means.
    student.begin(resolve_run().stages["on_policy"].optimiser)
    metrics = student.step(examples, stage.loss, step=0, num_steps=1, where="a test")
    assert metrics["loss"] == pytest.approx(mean, abs=2e-4)
    assert metrics["num_tokens"] == len(expected)


def test_a_group_of_rows_has_one_teacher(faculty: Faculty) -> None:
    model = load_model(open_checkpoint(resolve("nano", role="student")), torch.float32, "cpu")
    rollouts = mixed_rollouts(model)
    (examples,) = on_policy(faculty).signal(rollouts).updates
    groups = micro_batches(examples, None)
    assert sorted(len(group) for group in groups) == [3, 3]
    with pytest.raises(AssertionError, match="mixes teachers"):
        collate(examples, CPU)


def test_the_account_has_a_line_for_each_teacher(faculty: Faculty) -> None:
    model = load_model(open_checkpoint(resolve("nano", role="student")), torch.float32, "cpu")
    rollouts = mixed_rollouts(model)
    stage = on_policy(faculty)
    stage.signal(rollouts)
    entries = stage.crew.meter.account.entries
    lengths = [len(one.prompt_ids) + len(one.response_ids) for one in rollouts]
    assert {role: entry["on_policy"].tokens for role, entry in entries.items()} == {
        "teacher_score.sums": lengths[0] + lengths[2] + lengths[5],
        "teacher_score": lengths[1] + lengths[3] + lengths[4],
    }
    account = CostAccount.from_json(stage.crew.meter.account.to_json())
    assert account.entries == entries


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str((a + b) % 10), "domain": ("sums", "rest")[(a + b) % 2]}
        for a in range(10)
        for b in range(8)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def test_a_run_with_a_specialist(other: Path, prompts: Path, tmp_path: Path) -> None:
    small = [
        "stages.off_policy.num_prompts=24",
        "stages.off_policy.batch_size=8",
        "stages.off_policy.epochs=1",
        "stages.on_policy.steps=2",
        "stages.on_policy.prompts_per_step=8",
        "evaluation.num_questions=2",
        "evaluation.tasks=null",
        f"prompts={{kind: file, path: {prompts}}}",
        f"store={tmp_path}/store",
    ]
    out = tmp_path / "run"
    summary = run(config_with(other, *small), out, command=["a test"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["specialists"]["sums"]["name"] == str(other)
    checked = {finding["teacher"] for finding in manifest["preflight"]}
    assert checked == {"tiny", str(other)}
    for role in ("teacher_generate", "teacher_score"):
        assert summary["costs"][role]["tokens"] > 0 and summary["costs"][f"{role}.sums"]["tokens"] > 0
    # Every response is stored under the teacher that spoke it.
    revisions = {candidate.revision for candidate in find_teachers(config_with(other))}
    from teachers.store import ResponseStore

    for collection in ResponseStore(tmp_path / "store").collections():
        assert collection.meta["revision"] in revisions
        for key, kept in collection.walk([]):
            if key in manifest["stages"]["off_policy"]["responses"]:
                total = sum(int(digit) for digit in kept.rollout.request.prompt.messages[0]["content"][:3:2])
                assert (kept.rollout.speaker == str(other)) == (total % 2 == 0)
    kept_keys = [key for c in ResponseStore(tmp_path / "store").collections() for key, _ in c.walk([])]
    assert set(manifest["stages"]["off_policy"]["responses"]) <= set(kept_keys)


def test_what_cannot_be_routed_is_refused(other: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"specialists\.sums: no prompt has the domain 'sums'; .* are none"):
        run(config_with(other), tmp_path / "run", command=["a test"])
    own = f"prompts={{kind: file, path: {prompts}}}"
    misspelt = resolve_run(assignments=[f"specialists.sum={{model: {other}}}", own])
    with pytest.raises(UserError, match=r"'sum'; the prompts' domains are sums, rest"):
        run(misspelt, tmp_path / "run", command=["a test"])
    with pytest.raises(UserError, match=r"specialists\.sums names no model"):
        resolve_run(assignments=["specialists.sums={dtype: float32}"])
    with pytest.raises(UserError, match=r"specialists\.sums and another teacher are both called tiny"):
        find_teachers(resolve_run(assignments=["specialists.sums={model: tiny, dtype: bfloat16}"]))


def test_a_specialist_with_another_template_or_vocabulary_is_refused_by_name(
    other: Path, prompts: Path, tmp_path: Path
) -> None:
    own = f"prompts={{kind: file, path: {prompts}}}"
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match=rf"the chat template of {changed} is not the one"):
        run(config_with(changed, own), tmp_path / "run", command=["a test"])
    shutil.rmtree(changed)
    shutil.copytree(other, changed)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=rf"different vocabularies .* for {changed}"):
        run(config_with(changed, own), tmp_path / "run", command=["a test"])


def test_domains_with_equal_settings_share_one_teacher(other: Path) -> None:
    block = f"{{model: {other}, dtype: float32}}"
    config = resolve_run(assignments=[f"specialists={{sums: {block}, differences: {block}}}"])
    default, shared = find_teachers(config)
    assert (default.domains, shared.domains, shared.label) == ((), ("sums", "differences"), "sums+differences")
