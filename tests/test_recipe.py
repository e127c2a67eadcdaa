"""Configurations: the dump is a recipe, and what is wrong is one sentence with the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import RunConfig
from distill.errors import UserError
from distill.model_config import SamplerSettings, TeacherSettings
from distill.recipe import assign, dump_yaml, load_recipe, merge, parse_assignment, parse_yaml, validate
from pipelines.job import resolve_job
from pipelines.rehearsal import rehearse
from pipelines.resolution import recipe_names, resolve_run
from pipelines.strong_to_weak import run
from pipelines.validation import check_recipe


def test_dump_of_a_configuration_is_a_recipe_for_it() -> None:
    config = resolve_run(assignments=["stages.on_policy.optimiser.learning_rate=3e-5", "student.lora={rank: 8}"])
    assert validate(parse_yaml(dump_yaml(config), where="the dump")) == config
    assert config.stages["on_policy"].optimiser.learning_rate == 3e-5


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    config = resolve_run(recipe=name)
    assert next(iter(config.stages)) == "off_policy" and len(config.stages) >= 2


@pytest.mark.parametrize(
    ("assignment", "key"),
    [('store="a\\0b"', "store"), ('teacher={backend: vllm, server_args: [--x, "\\0"]}', "teacher.server_args.1")],
)
def test_a_nul_is_a_sentence(assignment: str, key: str) -> None:
    """The system refuses one with a ValueError, which the dry run of a store showed as it was."""
    with pytest.raises(UserError, match=rf"is not valid: {re.escape(key)} holds a NUL character"):
        resolve_run(assignments=[assignment])


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: embedded\nseed: 3\nstages:\n  on_policy: null\n  off_policy: {epochs: 5}\n")
    config = resolve_run(recipe=str(own))
    base = resolve_run(recipe="embedded")
    assert list(config.stages) == ["off_policy"] and config.seed == 3 and config.teacher == base.teacher
    assert config.stages["off_policy"] == base.stages["off_policy"].model_copy(update={"epochs": 5})
    assert list(resolve_run(assignments=["stages.off_policy=null"]).stages) == ["on_policy"]
    own.write_text(f"extends: {own}\n")
    with pytest.raises(UserError, match="extends itself"):
        resolve_run(recipe=str(own))
    own.write_text("extends: embeded\n")
    with pytest.raises(UserError, match="did you mean embedded"):
        resolve_run(recipe=str(own))


def test_yaml_is_read_as_yaml_1_2() -> None:
    """PyYAML alone reads no as False and 1e-5 as a string."""
    text = "a: no\nb: 1e-5\nc: on\nd: 2024-01-01\ne: null\nf: true\ng: 0x10\nh: [1, 2.5, -.5]\n"
    expected = {
        "a": "no",
        "b": 1e-5,
        "c": "on",
        "d": "2024-01-01",
        "e": None,
        "f": True,
        "g": "0x10",
        "h": [1, 2.5, -0.5],
    }
    assert parse_yaml(text, where="a test") == expected


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"sede": 1}, r"unknown key sede \(did you mean seed\?"),
        ({"stages": {"x": {"kind": "on_policy", "stepps": 1}}}, r"unknown key stages.x.stepps \(did you mean steps\?"),
        (
            {"stages": {"x": {"kind": "dpo"}}},
            r"stages.x: kind must be one of 'grpo', 'off_policy', 'on_policy', 'opd_reward'",
        ),
        (
            {"stages": {"x": {"steps": 3}}},
            r"stages.x: kind must be one of 'grpo', 'off_policy', 'on_policy', 'opd_reward'",
        ),
        ({"prompts": {"path": "x"}}, r"prompts: kind must be one of 'embedded', 'file', 'hub'"),
        ({"student": {"lora": {"rnk": 1}}}, r"unknown key student.lora.rnk \(did you mean rank\?"),
        ({"seed": -1}, r"seed: Input should be greater than or equal to 0 \(got -1\)"),
        ({"stages": {}}, "stages is empty"),
        ({"stages": {"start": {"kind": "on_policy"}}}, "may not be called 'start'"),
        ({"name": "../escape"}, "name: String should match pattern"),
        ({"stages": {"x": {"kind": "on_policy", "optimiser": {"learning_rate": float("nan")}}}}, "finite number"),
        # Each would be taken for the number 1.
        ({"stages": {"x": {"kind": "on_policy", "steps": True}}}, "stages.x: steps has true or false"),
        ({"evaluation": {"budgets": [True]}}, "evaluation: budgets has true or false"),
        ({"seed": False}, "seed has true or false"),
        # Each would be examined, charged and reported twice.
        ({"evaluation": {"modes": ["think", "think"]}}, "evaluation.modes: think stands there twice"),
        ({"evaluation": {"budgets": [8, 16, 8]}}, "evaluation.budgets: 8 stands there twice"),
        ({"evaluation": {"tasks": [{"name": "embedded", "modes": ["think", "think"]}]}}, "modes: think stands there"),
        ({"evaluation": {"tasks": [{"name": "embedded", "modes": []}]}}, "modes: Tuple should have at least 1 item"),
    ],
)
def test_what_is_wrong_is_named(tree: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(tree)


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (
            ["sampler.backend=vllm", "stages.on_policy.sampling.think.temperature=2.5"],
            "stages.on_policy.sampling in think mode: temperature is 2.5, and vLLM draws at 0.01 to 2.0; set it to one "
            "of these, or set sampler.backend to transformers",
        ),
        (
            ["sampler.backend=vllm", "stages.on_policy.sampling.no_think.temperature=0.001"],
            "stages.on_policy.sampling in no_think mode: temperature is 0.001",
        ),
        (
            ["sampler.backend=vllm", "stages.on_policy.sampling.think={presence_penalty: 1.0, thinking_budget: 20}"],
            "stages.on_policy.sampling in think mode: vLLM cannot keep a presence penalty across a thinking budget",
        ),
        (
            ["sampler.backend=vllm", "evaluation.sampling.think.presence_penalty=-3.0"],
            "evaluation.sampling in think mode: presence_penalty is -3.0, and vLLM's is at most 2.0 either way",
        ),
        (
            ["sampler.backend=vllm", "evaluation.sampling.think.presence_penalty=1.0", "evaluation.budgets=[8]"],
            "evaluation.sampling, with evaluation.budgets in think mode: vLLM cannot keep",
        ),
        (
            ["teacher.backend=vllm", "stages.off_policy.sampling.think.temperature=3"],
            "stages.off_policy.sampling in think mode: temperature is 3.0, and vLLM draws at 0.01 to 2.0; set it to "
            "one of these, or set teacher.backend to local",
        ),
        (
            ["teacher.backend=vllm", "evaluation.sampling.no_think.temperature=3"],
            "evaluation.sampling in no_think mode: temperature is 3.0",
        ),
        (
            ["specialists.code={model: 4B, backend: vllm}", "stages.off_policy.sampling.think.temperature=3"],
            "or set specialists.code.backend to local",
        ),
    ],
)
def test_what_vllm_cannot_draw_is_refused_with_the_configuration(assignments: list[str], sentence: str) -> None:
    backends = ("sampler.backend", "teacher.backend")
    with pytest.raises(UserError, match=re.escape(sentence)):
        resolve_run(assignments=assignments)
    # Whoever draws in this process may.
    here = [text.replace("backend: vllm", "backend: local") for text in assignments if not text.startswith(backends)]
    resolve_run(assignments=here)


def test_what_vllm_does_not_draw_may_be_anything() -> None:
    hot = "stages.on_policy.sampling.think.temperature=3"
    resolve_run(assignments=["teacher.backend=vllm", hot])
    examined = ["teacher.backend=vllm", "evaluation.sampling.think.temperature=3", "evaluation.references=false"]
    resolve_run(assignments=examined)
    resolve_run(assignments=["sampler.backend=vllm", "stages.off_policy.sampling.think.temperature=3"])


FOR_VLLM = {
    "place": "in_process",
    "sync": "nccl",
    "sleep": "true",
    "devices": '["1"]',
    "tolerance": "1.0e-6",
    "server_args": '[--max-num-seqs, "8"]',
    "patience_seconds": "5",
}


@pytest.mark.parametrize("name", FOR_VLLM)
def test_what_only_vllm_reads_is_refused_where_the_trained_model_speaks(name: str) -> None:
    assignment = f"sampler.{name}={FOR_VLLM[name]}"
    with pytest.raises(UserError, match=rf"sampler\.{name} is for vLLM, .* set sampler\.backend=vllm, or leave"):
        resolve_run(assignments=[assignment])
    config = resolve_run(assignments=["sampler.backend=vllm", assignment])
    assert validate(parse_yaml(dump_yaml(config), where="dump")) == config


def test_every_setting_of_the_sampler_has_a_reader() -> None:
    """A new one is read by the trained model's own sampler, or named above."""
    assert {*SamplerSettings.model_fields} == {"backend", "staleness", *FOR_VLLM}
    written = SamplerSettings().model_dump(mode="json")
    assert resolve_run(assignments=[f"sampler={json.dumps(written)}"]).sampler == SamplerSettings()


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel", "replicas"])
def test_cuts_of_the_teacher_s_servers_are_refused_where_it_has_none(name: str) -> None:
    for place, model in (("teacher", "4B"), ("specialists.maths", "8B")):
        set_to = [f"{place}.model={model}", f"{place}.{name}=2"]
        sentence = rf"{place}: {name} is for the run's own vLLM servers, .* set backend to vllm, or {name} to 1 "
        with pytest.raises(UserError, match=sentence):
            resolve_run(assignments=set_to)
        with pytest.raises(UserError, match=sentence):
            resolve_run(assignments=[*set_to, f"{place}.backend=local"])
        config = resolve_run(assignments=[*set_to, f"{place}.backend=vllm"])
        assert validate(parse_yaml(dump_yaml(config), where="dump")) == config


def test_what_a_plan_reads_of_a_teacher_is_taken_where_it_is_in_this_process() -> None:
    """A plan may put it behind servers; and the dump of a run names every key."""
    read = {"quantization": "fp8", "wire": "fp32", "server_args": ["--x"], "patience_seconds": 5}
    urls = {"generate": ["http://a:1"], "score": ["http://a:2"]}
    resolve_run(assignments=[f"teacher={json.dumps({'model': '4B', 'backend': 'local', 'urls': urls, **read})}"])
    written = TeacherSettings().model_dump(mode="json")
    assert resolve_run(assignments=[f"teacher={json.dumps(written)}"]).teacher == TeacherSettings()


@pytest.mark.parametrize("other", ["parallel=replicated", "lora.rank=8", "adamw=8bit"])
def test_offload_is_refused_beside_what_wants_a_whole_student(other: str) -> None:
    """The run would overrule the first; the others it refused after a plan had said that nothing fits."""
    name = other.partition(".")[0]
    with pytest.raises(UserError, match=rf"student: cpu_offload is for .* slices, and student\.{name} for one"):
        resolve_run(assignments=["student.cpu_offload=true", f"student.{other}"])
    for alone in ("cpu_offload=true", other):
        resolve_run(assignments=[f"student.{alone}"])
    resolve_run(assignments=["student.cpu_offload=true", "student.parallel=sharded"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("urls.score", "[http://a:1]"),
        ("urls.generate", "[http://a:1]"),
        ("wire", "fp32"),
        ("quantization", "fp8"),
        ("server_args", "[--x, --y]"),
        ("patience_seconds", "5.0"),
    ],
)
@pytest.mark.parametrize("place", ["teacher", "specialists.maths"])
def test_what_a_run_would_pass_over_is_refused(
    place: str, setting: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run, by its rehearsal, and where a job of it is added: responses of a teacher that nobody quantised were
    stored as a quantised one's."""
    monkeypatch.chdir(tmp_path)
    set_to = [f"{place}.model=tiny", f"{place}.dtype=float32", f"{place}.{setting}={value}"]
    config = resolve_run(recipe="embedded", assignments=set_to)
    sentence = rf"^{place}\.{setting} is {re.escape(value)}, and {place}\.backend=local has no vLLM servers"
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path / "run", command=["distill", "run"])
    with pytest.raises(UserError, match=sentence):
        rehearse(config, tmp_path / "other", processes=1)
    (tmp_path / "job.yaml").write_text(dump_yaml(config))
    with pytest.raises(UserError, match=sentence):
        resolve_job(tmp_path / "job.yaml")
    with pytest.raises(UserError, match=sentence):
        check_recipe("job.yaml")
    resolve_run(recipe="embedded", assignments=[*set_to, f"{place}.backend=vllm"]).check_teachers()


def test_processes_that_a_step_cannot_be_shared_among_are_refused() -> None:
    config = resolve_run(assignments=["stages.on_policy.prompts_per_step=3", "stages.off_policy.batch_size=2"])
    config.check_processes(2)
    sentence = r"stages\.off_policy\.batch_size is 2, and a step of it cannot be shared among 3 processes; raise it"
    with pytest.raises(UserError, match=sentence):
        config.check_processes(3)
    config = resolve_run(assignments=["stages.on_policy.prompts_per_step=1"])
    with pytest.raises(UserError, match=r"prompts_per_step is 1.*start at most 1 process$"):
        config.check_processes(2)


def test_layers() -> None:
    base = {"prompts": {"kind": "embedded", "max_operations": 3}, "seed": 1}
    assert merge(base, {"prompts": {"max_operations": 4}})["prompts"] == {"kind": "embedded", "max_operations": 4}
    # Keys of another kind mean nothing to the new one.
    assert merge(base, {"prompts": {"kind": "file", "path": "x"}})["prompts"] == {"kind": "file", "path": "x"}
    tree: dict[str, object] = {}
    assign(tree, "a.b.c", 1)
    assert tree == {"a": {"b": {"c": 1}}}
    with pytest.raises(UserError, match=r"a\.b\.c is a value"):
        assign(tree, "a.b.c.d", 2)


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=3", "a=[1"])
def test_an_assignment_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(UserError):
        parse_assignment(text)


def test_recipe_choice_follows_the_models() -> None:
    assert resolve_run().teacher.model == "tiny"
    assert resolve_run(student="nano-moe").name == "tiny-to-nano-moe"
    real = resolve_run(teacher="32B", student="4B")
    assert real.prompts.kind == "hub" and real.name == "32B-to-4B"
    with pytest.raises(UserError, match="did you mean embedded"):
        resolve_run(recipe="embeded")


def test_own_prompts_are_examined_on_themselves_unless_told_otherwise(tmp_path: Path) -> None:
    assert resolve_run(prompts="my.jsonl").evaluation.tasks is None
    assert resolve_run(prompts="my.jsonl", assignments=["evaluation.tasks=[gsm8k]"]).evaluation.tasks == ("gsm8k",)
    # The same assignment as a block.
    assert resolve_run(prompts="my.jsonl", assignments=["evaluation={tasks: [gsm8k]}"]).evaluation.tasks == ("gsm8k",)

    own, above = tmp_path / "own.yaml", tmp_path / "above.yaml"
    own.write_text("extends: embedded\nevaluation: {tasks: [prompts, gsm8k]}\n")
    above.write_text(f"extends: {own}\nseed: 3\n")
    for recipe in (own, above):
        found = resolve_run(recipe=str(recipe), prompts="my.jsonl")
        assert found.evaluation.tasks == ("prompts", "gsm8k"), "a recipe of one's own means what it says"
    own.write_text("extends: embedded\nevaluation: {samples: 2}\n")
    assert resolve_run(recipe=str(above), prompts="my.jsonl").evaluation.tasks is None


def test_assignments_reach_the_prompts_that_a_flag_names() -> None:
    """What the refusal of a file without a column 'prompt' tells its reader to do."""
    prompts = resolve_run(prompts="my.jsonl", assignments=["prompts.prompt_column=question"]).prompts
    assert prompts.kind == "file" and prompts.prompt_column == "question" and prompts.path.endswith("/my.jsonl")
    # A key of other prompts is no key of these, and nothing is dropped in silence.
    with pytest.raises(UserError, match=r"unknown key prompts\.max_operations"):
        resolve_run(prompts="my.jsonl", assignments=["prompts.max_operations=3"])
    assert resolve_run(seed=2, assignments=["seed=1"]).seed == 2


@given(st.text())
def test_any_text_is_a_recipe_or_one_sentence(text: str) -> None:
    try:
        tree = parse_yaml(text, where="a test")
        if isinstance(tree, dict):
            validate(tree)
    except UserError as error:
        assert "\n" not in str(error).strip()


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"- a\n- b\n", b"a: [1\n", b"", b"student: {dtype: float32}\nseed: 1\nseed: 2\n"):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content)
        with pytest.raises(UserError, match="recipe"):
            load_recipe(path)
    assert RunConfig().longest_response == 30720
