"""Pairs that must not be distilled: each is refused by the check that is there for it, with the cure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill.checkpoint import Checkpoint, load_tokenizer, open_checkpoint, same_weights
from distill.embedded.tokenizer import VOCAB_ROWS, build_tokenizer
from distill.errors import UserError
from distill.family import ModelSource
from distill.types import MODES
from pipelines.preflight import CHECKS, Finding, check_pair, shown
from pipelines.resolution import resolve_run


def save_model(folder: Path, rows: int = VOCAB_ROWS, *, seed: int = 0) -> None:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    save_model(folder)
    build_tokenizer().save_pretrained(folder)
    edit(folder / "generation_config.json", lambda content: content.update(eos_token_id=[281, 282]))
    return folder


@pytest.fixture
def pair(whole: Path, tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(("teacher", "student")):
        shutil.copytree(whole, tmp_path / name)
        generation = (tmp_path / name / "generation_config.json").read_text()
        save_model(tmp_path / name, seed=seed)
        (tmp_path / name / "generation_config.json").write_text(generation)
    return tmp_path / "teacher", tmp_path / "student"


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(folder.name, "directory", str(folder)))


def check(
    pair: tuple[Path, Path],
    *,
    max_prompt_tokens: int = 28,
    max_new_tokens: int = 100,
    skip: tuple[str, ...] = (),
    **options: Any,
) -> list[Finding]:
    teacher, student = (opened(folder) for folder in pair)
    lengths = {"max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens}
    tokenizers = [load_tokenizer(model) for model in (teacher, student)]
    return list(check_pair(teacher, tokenizers[0], student, tokenizers[1], **lengths, skip=skip, **options))


def failed_check(pair: tuple[Path, Path], **lengths: int) -> tuple[str, str]:
    """The name of the check that refuses the pair (each one before it skipped or passed), and its sentence."""
    skip: list[str] = []
    for name in CHECKS:
        try:
            check(pair, skip=tuple(other for other in CHECKS if other != name), **lengths)
        except UserError as error:
            with pytest.raises(UserError):
                check(pair, skip=tuple(skip), **lengths)
            return name, str(error)
        skip.append(name)
    raise AssertionError("no check refused the pair")


def test_a_pair_of_one_family_passes_every_check(pair: tuple[Path, Path]) -> None:
    findings = check(pair)
    assert [finding.check for finding in findings] == list(CHECKS)
    assert not any(finding.skipped for finding in findings)
    assert "251 tokens" not in findings[0].text


def test_serialisations_may_differ(pair: tuple[Path, Path]) -> None:
    """tokenizer.json against the older pair of files, and merges written as text."""
    student = pair[1]
    content = json.loads((student / "tokenizer.json").read_text())
    model = content["model"]
    (student / "tokenizer.json").unlink()
    (student / "vocab.json").write_text(json.dumps(model["vocab"]))
    (student / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    edit(student / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=added))
    assert len(check(pair)) == len(CHECKS)
    edit(pair[0] / "tokenizer.json", lambda content: content["model"].update(merges=[*map(" ".join, model["merges"])]))
    assert len(check(pair)) == len(CHECKS)


def test_special_flag_of_an_added_token_is_no_difference(pair: tuple[Path, Path]) -> None:
    edit(pair[1] / "tokenizer.json", lambda content: content["added_tokens"][2].update(special=False))
    assert len(check(pair)) == len(CHECKS)


def swap_tokens(content: Any) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]


def swap_merges(content: Any) -> None:
    """(as, s) before (a, s): `ass` can then no longer be built the same way."""
    merges = content["model"]["merges"]
    merges.insert(0, merges.pop(merges.index(["us", "e"])))


def lower_case(content: Any) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


@pytest.mark.parametrize(
    ("change", "name", "sentence"),
    [
        (swap_tokens, "vocabulary", "token 18 is '3' for teacher and '4' for student"),
        (lambda content: content["added_tokens"].pop(3), "added_tokens", "'<think>' differs: teacher has id 284"),
        (lambda content: content["added_tokens"][3].update(lstrip=True), "added_tokens", "has id 284 (lstrip)"),
        (swap_merges, "merges", "merge 0 joins"),
        (lambda content: content["model"]["merges"].pop(), "merges", "and absent for student"),
        (lower_case, "encoding", 'tokenise differently: the text "The quick'),
    ],
)
def test_tokenizers_that_differ_are_refused(
    pair: tuple[Path, Path], change: Callable[[Any], object], name: str, sentence: str
) -> None:
    edit(pair[1] / "tokenizer.json", change)
    # transformers rebuilds the splitting rules of a known class; the plain one takes the file as it is.
    for folder in pair:
        edit(
            folder / "tokenizer_config.json", lambda content: content.update(tokenizer_class="PreTrainedTokenizerFast")
        )
    refused_by, text = failed_check(pair)
    assert (refused_by, sentence in text) == (name, True), text
    assert "--teacher 4B --student 0.6B" in text


def test_vocabulary_rows_that_differ_are_refused(pair: tuple[Path, Path]) -> None:
    save_model(pair[1], VOCAB_ROWS + 64)
    name, text = failed_check(pair)
    assert name == "vocabulary_rows"
    assert "320 vocabulary rows and student 384" in text
    assert "resize_token_embeddings(384)" in text


def test_fewer_rows_than_tokens_are_refused(pair: tuple[Path, Path]) -> None:
    for seed, folder in enumerate(pair):
        save_model(folder, 280, seed=seed)
    name, text = failed_check(pair)
    assert name == "vocabulary_rows"
    assert "280 vocabulary rows and the tokenizer's ids go up to 286" in text


@pytest.mark.parametrize("who", [0, 1])
def test_stop_ids_outside_the_family_are_refused(pair: tuple[Path, Path], who: int) -> None:
    edit(pair[who] / "generation_config.json", lambda content: content.update(eos_token_id=[281, 5]))
    name, text = failed_check(pair)
    assert name == "stop_ids"
    assert f"the {('teacher', 'student')[who]} " in text
    assert "token 5" in text
    assert "<|endoftext|> (282) and <|im_end|> (281)" in text
    assert f"{pair[who] / 'generation_config.json'}" in text


@pytest.mark.parametrize("ids", [281, 282, [282, 281]])
def test_any_of_the_stop_ids_is_one_action(pair: tuple[Path, Path], ids: object) -> None:
    edit(pair[1] / "generation_config.json", lambda content: content.update(eos_token_id=ids))
    assert len(check(pair)) == len(CHECKS)


def test_a_tokenizer_that_ends_elsewhere_is_refused(pair: tuple[Path, Path]) -> None:
    edit(pair[1] / "tokenizer_config.json", lambda content: content.update(eos_token="<think>"))
    name, text = failed_check(pair)
    assert (name, "'<think>' (284)" in text) == ("stop_ids", True), text


def test_lengths_beyond_the_context_are_refused(pair: tuple[Path, Path]) -> None:
    name, text = failed_check(pair, max_prompt_tokens=29)
    assert name == "context"
    assert "128 tokens" in text
    assert "29 + max_new_tokens 100 = 129" in text
    # The examination speaks as well, and its limit may be the longest.
    assert "stages.*.sampling.*.max_new_tokens and evaluation.sampling.*.max_new_tokens that are 100" in text


def test_a_token_behind_the_longest_sequence_needs_a_position_too(pair: tuple[Path, Path]) -> None:
    for role, model in zip(("teacher", "student"), pair, strict=True):
        with pytest.raises(UserError) as refused:
            check(pair, one_more=(role,))
        assert f"the {role} {model.name} takes 128 tokens" in str(refused.value)
        assert "28 + max_new_tokens 100 + 1 = 129 (vLLM tells" in str(refused.value)
        check(pair, max_new_tokens=99, one_more=(role,))


@pytest.mark.parametrize(
    ("assignments", "student", "teacher"),
    [
        (["sampler.backend=vllm"], False, False),
        (["sampler.backend=vllm", "stages.on_policy.sampling.think.thinking_budget=8"], True, False),
        (["stages.on_policy.sampling.think.thinking_budget=8"], False, False),
        # A response that is shorter than the longest has the position anyway.
        (
            [
                "sampler.backend=vllm",
                "stages.on_policy.sampling.think={thinking_budget: 8, max_new_tokens: 20}",
                "evaluation.sampling.think.max_new_tokens=64",
            ],
            False,
            False,
        ),
        (["teacher.backend=vllm"], False, False),
        (["teacher.backend=vllm", "stages.off_policy.sampling.think.thinking_budget=8"], False, True),
        (["teacher.backend=vllm", "teacher.signal=topk"], False, True),
        (["teacher.signal=topk"], False, False),
    ],
)
def test_whom_vllm_is_asked_for_one_token_more(assignments: list[str], student: bool, teacher: bool) -> None:
    blocks = ("evaluation", "stages.off_policy", "stages.on_policy")
    same = [f"{block}.sampling.{mode}.max_new_tokens=32" for block in blocks for mode in MODES]
    config = resolve_run(assignments=[*same, *assignments])
    assert (config.student_says_one_more, config.teacher_says_one_more(config.teacher)) == (student, teacher)


def test_a_teacher_without_a_chat_template_is_refused(pair: tuple[Path, Path]) -> None:
    (pair[0] / "chat_template.jinja").unlink()
    assert failed_check(pair)[0] == "rendering"
    (pair[1] / "chat_template.jinja").unlink()
    assert failed_check(pair)[0] == "rendering"


def test_the_student_needs_no_chat_template(pair: tuple[Path, Path]) -> None:
    (pair[1] / "chat_template.jinja").unlink()
    assert len(check(pair)) == len(CHECKS)


def test_a_skipped_check_is_recorded_and_an_unknown_one_refused(pair: tuple[Path, Path]) -> None:
    edit(pair[1] / "generation_config.json", lambda content: content.update(eos_token_id=5))
    assert [finding.check for finding in check(pair, skip=("stop_ids",)) if finding.skipped] == ["stop_ids"]
    for name, near in (("stop_id", "stop_ids"), ("response", "responses")):
        with pytest.raises(UserError, match=rf"no check '{name}' to skip; did you mean {near}\?"):
            resolve_run(assignments=[f"preflight.skip=[context, {name}]"])
    assert resolve_run(assignments=["preflight.skip=[context, responses]"]).preflight.skip == ("context", "responses")


def test_a_model_is_its_own_teacher_only_where_that_is_meant(pair: tuple[Path, Path]) -> None:
    teacher, student = pair
    shutil.copy(teacher / "model.safetensors", student)
    edit(student / "config.json", lambda content: content.update(max_position_embeddings=256))
    assert opened(teacher).revision != opened(student).revision, "the weights alone are the same"
    name, text = failed_check(pair)
    assert name == "different_weights"
    assert "hold the same weights" in text and "preflight.same_weights=true" in text
    assert "which this run allows" in check(pair, same_weights_allowed=True)[-1].text


def test_weights_are_compared_by_content(pair: tuple[Path, Path]) -> None:
    """In another number type they are the same model; with one number changed they are not."""
    teacher, student = pair
    weights = load_file(teacher / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, student / "model.safetensors")
    assert same_weights(opened(teacher), opened(student))
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] += 1.0
    save_file(weights, student / "model.safetensors")
    assert not same_weights(opened(teacher), opened(student))


def test_a_specialist_with_another_chat_template_is_refused(pair: tuple[Path, Path]) -> None:
    run = load_tokenizer(opened(pair[0]))
    run.chat_template = f"{run.chat_template} "
    with pytest.raises(UserError, match=r"the chat template of teacher is not the one .* chat_template\.jinja"):
        check(pair, template=run)


def test_findings_are_shown_a_line_each(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(shown(check(pair, skip=("merges",)), "student"))) == len(CHECKS)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "preflight, teacher teaches student:"
    assert len(lines) == 1 + len(CHECKS)
    assert lines[1].split()[:2] == ["ok", "vocabulary"] and lines[3].split() == [
        "-",
        "merges",
        "skipped",
        "on",
        "request",
    ]


def test_a_teacher_of_one_mode_is_refused_where_the_run_asks_in_both(pair: tuple[Path, Path]) -> None:
    """Models that were published for one mode have a template without the switch: half of the prompts would be asked,
    and half of the responses taken, in a mode that they are not in."""
    file = pair[0] / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    switch = "enable_thinking is defined and enable_thinking is false"
    assert switch in text
    file.write_text(text.replace(switch, "false"), encoding="utf-8")
    with pytest.raises(UserError, match=r"template of teacher renders a prompt alike .*mixture\.think_share to 1"):
        check(pair)
    for share, mode in ((0, "no_think"), (1, "think")):
        shares = [f"stages.{stage}.mixture.think_share={share}" for stage in ("off_policy", "on_policy")]
        assert resolve_run(assignments=shares).modes == (mode,)
        assert resolve_run(assignments=shares[:1]).modes == MODES
        (found,) = (finding for finding in check(pair, modes=[mode]) if finding.check == "modes")
        assert mode in found.text
