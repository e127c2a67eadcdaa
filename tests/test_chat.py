"""The chat format, against Qwen3's own renderings and the three forms of a response."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.chat import EARLY_STOP, EMPTY_THINK, Parts, render, split_thinking, switch_in, with_switch
from distill.errors import UserError

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "qwen3_chat_cases.json").read_text("utf-8"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_renders_byte_for_byte_like_qwen3(case: dict[str, Any]) -> None:
    text = render(
        case["messages"],
        enable_thinking=case["enable_thinking"],
        add_generation_prompt=case["add_generation_prompt"],
    )
    assert text == case["text"]


def test_parallel_calls_and_their_results_share_a_turn() -> None:
    calls = [
        {"name": "f", "arguments": '{"x": "<\u4f60>"}'},
        {"function": {"name": "g", "arguments": {"y": "<\u4f60>"}}},
    ]
    messages: list[dict[str, Any]] = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert render(messages, add_generation_prompt=False) == (
        "<|im_start|>user\nq<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"x": "<\u4f60>"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "g", "arguments": {"y": "<\u4f60>"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def test_a_tool_result_in_a_user_message_is_no_new_question() -> None:
    turn = assistant("<think>\nhm\n</think>\n\nb")
    kept = render([user("a"), turn, user("<tool_response>\n1\n</tool_response>")])
    stripped = render([user("a"), turn, user("c")])
    assert "hm" in kept
    assert "hm" not in stripped


def test_a_user_message_is_never_read_as_template_code() -> None:
    assert "{{ 7 * 7 }}" in render([user("{{ 7 * 7 }}")])


@pytest.mark.parametrize("message", [{"role": "critic", "content": "a"}, {"role": "user", "content": [{"text": "a"}]}])
def test_refuses_what_it_cannot_render(message: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        render([message])


def test_early_stop_and_empty_block_close_the_thinking() -> None:
    assert split_thinking(f"<think>\n1+1={EARLY_STOP}2").answer == "2"
    assert split_thinking(f"{EMPTY_THINK}2") == Parts(thinking="", answer="2", closed=True)


@pytest.mark.parametrize(
    ("messages", "mode"),
    [
        ([user("1+1?")], None),
        ([user("1+1? /think")], "think"),
        ([user("/no_think 1+1?")], "no_think"),
        ([user("1+1? (/no_think).")], "no_think"),
        ([user("/think then /no_think")], "no_think"),
        ([{"role": "system", "content": "/no_think"}, user("a")], "no_think"),
        ([{"role": "system", "content": "/no_think"}, user("a /think")], "think"),
        ([user("a /no_think"), assistant("b"), user("c")], "no_think"),
        ([user("a /no_think"), assistant("say /think"), user("c")], "no_think"),
        ([user("a /no_think"), {"role": "tool", "content": "/think"}], "no_think"),
        ([user("/thinking")], None),
        ([user("a/think/b")], None),
        ([user("/no_thinking")], None),
        ([user("//think ./think /think/ /think.py /think-tank x/no_think")], None),
    ],
)
def test_the_last_flag_that_is_a_whole_word_wins(messages: list[dict[str, str]], mode: str | None) -> None:
    assert switch_in(messages) == mode


def test_with_switch_writes_at_the_end_of_the_last_user_message() -> None:
    messages = [user("a /think"), assistant("b"), user("c"), assistant("d")]
    switched = with_switch(messages, "no_think")
    assert [message["content"] for message in switched] == ["a /think", "b", "c /no_think", "d"]
    assert switch_in(switched) == "no_think"
    assert messages[2]["content"] == "c"


def test_with_switch_needs_a_user_message() -> None:
    with pytest.raises(UserError):
        with_switch([assistant("b")], "think")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nhm\n</think>\n\nb<|im_end|>", Parts("hm", "b", True)),
        ("<think>\n\n</think>\n\nb", Parts("", "b", True)),
        ("b<|im_end|>", Parts("", "b", True)),
        ("<think>\nhm", Parts("hm", "", False)),
        ("<think>\nhm\n</think>\n\nb<think>c", Parts("c", "", False)),
        ("hm\n</think>\n\nb", Parts("hm", "b", True)),
        ("<think>x</think>", Parts("x", "", True)),
        ("", Parts("", "", True)),
    ],
)
def test_splits_every_form_of_a_response(text: str, parts: Parts) -> None:
    assert split_thinking(text) == parts


def test_the_chat_format_and_the_task_load_neither_torch_nor_transformers() -> None:
    modules = "distill.chat, distill.embedded.task"
    code = f"import sys, {modules}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
