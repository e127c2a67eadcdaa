"""The ids that both models see: modes, switches and the empty block, on the embedded tokenizer."""

from __future__ import annotations

from copy import copy

import pytest
from transformers import AutoTokenizer

from distill.chat import EARLY_STOP, EMPTY_THINK
from distill.embedded import checkpoint_dir
from distill.encode import Encoder
from distill.errors import UserError
from distill.types import Prompt, Rollout, Sampling

ASK = Prompt(({"role": "user", "content": "3+4="},))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(checkpoint_dir("tiny")))


def test_modes_differ_only_where_they_should(encoder: Encoder) -> None:
    think = encoder.decode(encoder.encode(ASK, mode="think", switch="hard"))
    hard = encoder.decode(encoder.encode(ASK, mode="no_think", switch="hard"))
    soft = encoder.decode(encoder.encode(ASK, mode="no_think", switch="soft"))
    assert think.endswith("<|im_start|>assistant\n")
    assert hard == think + EMPTY_THINK  # the block is prompt: masked, and in the teacher's context too
    assert soft == think.replace("3+4=", "3+4= /no_think")  # the model writes the block itself: response


def test_a_long_prompt_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded tokenizer says 2,048 and its models take 4,096; transformers warned of indexing errors."""
    warned = list[str]()
    logger = "transformers.tokenization_utils_base.logger"
    monkeypatch.setattr(f"{logger}.warning", lambda text, *rest, **more: warned.append(text))
    fresh = Encoder(AutoTokenizer.from_pretrained(checkpoint_dir("tiny")))
    assert fresh.count_tokens([{"role": "user", "content": "3+" * 1200 + "4="}]) > 2048 and not warned


def test_a_flag_in_the_prompt_is_left_alone(encoder: Encoder) -> None:
    flagged = Prompt(({"role": "user", "content": "3+4= /no_think"},))
    assert "/no_think /no_think" not in encoder.decode(encoder.encode(flagged, mode="no_think", switch="soft"))
    turned = encoder.decode(encoder.encode(flagged, mode="think", switch="soft"))
    assert "/no_think /think" in turned


def test_early_stop_is_one_token_and_closes_thinking(encoder: Encoder) -> None:
    assert len(encoder.early_stop_ids) == 1
    assert encoder.decode(encoder.early_stop_ids) == EARLY_STOP
    request = encoder.request(ASK, mode="think", sampling=Sampling(9), seed=0)
    opened, closed = (encoder.think_open_id, 5), (encoder.think_open_id, 5, encoder.think_close_id)
    for ids, forced, expected in (
        (opened, (False, False), False),
        (closed, (False,) * 3, True),
        ((*opened, *encoder.early_stop_ids), (False, False, True), True),
        ((*closed, 5, *opened), (False,) * 6, False),
        ((*closed, 5, encoder.think_open_id, encoder.stop_ids[0]), (False,) * 6, False),
        ((5, encoder.think_close_id), (False,) * 2, True),  # the prompt has opened it
        ((5, 6), (False,) * 2, False),
    ):
        rollout = Rollout(request, ids, forced, (0.0,) * len(ids), "length", "student")
        assert encoder.closed_thinking(rollout) is expected


def test_an_early_stop_that_was_cut_before_its_closing_mark_left_thinking_open(encoder: Encoder) -> None:
    """Of a tokenizer that takes several tokens for it, as Qwen3's does."""
    request = encoder.request(ASK, mode="think", sampling=Sampling(4), seed=0)
    of_several = copy(encoder)
    of_several.early_stop_ids = (7, 8, encoder.think_close_id, 9)
    for forced in range(1, 5):
        ids = (encoder.think_open_id, 5, *of_several.early_stop_ids[:forced])
        rollout = Rollout(request, ids, (False, False, *[True] * forced), (0.0,) * len(ids), "length", "student")
        assert of_several.closed_thinking(rollout) is (forced >= 3)


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir("tiny"))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizer)
