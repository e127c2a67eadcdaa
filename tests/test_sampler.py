"""The decoding loop against the model's own forward pass: what it says it drew, it must have drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill.draw import Draw, inverse_transform
from distill.kv_cache import SlotCache
from distill.sampler import TransformersSampler
from distill.stage_config import SamplingSettings
from distill.types import COLDEST, Prompt, Request, Sampling

VOCABULARY, STOP, OPEN, CLOSE = 40, 37, 38, 39
EARLY_STOP = (30, 31, CLOSE, 32)


class TinyEncoder:
    stop_ids = (STOP, 36)
    think_open_id = OPEN
    think_close_id = CLOSE
    early_stop_ids = EARLY_STOP


class Endless(TinyEncoder):
    stop_ids = ()


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


def request(seed: int, length: int = 5, **sampling: object) -> Request:
    prompt = Prompt(({"role": "user", "content": str(seed)},))
    ids = tuple(1 + (seed + place) % 20 for place in range(length))
    return Request(prompt, "think", "hard", ids, Sampling(**{"max_new_tokens": 12, **sampling}), seed)


def endless(model: Qwen3ForCausalLM, batch: int = 64) -> TransformersSampler:
    return TransformersSampler(model, Endless(), speaker="student", batch=batch)  # type: ignore[arg-type]


def sampler(model: Qwen3ForCausalLM, batch: int = 64) -> TransformersSampler:
    return TransformersSampler(model, TinyEncoder(), speaker="student", batch=batch)  # type: ignore[arg-type]


def test_a_response_depends_on_its_request_alone(model: Qwen3ForCausalLM) -> None:
    requests = [request(seed, length=3 + seed % 7) for seed in range(40)]
    together = sampler(model).generate(requests)
    apart = [sampler(model).generate([one])[0] for one in requests]
    shuffled = sampler(model, batch=7).generate(requests[::-1])[::-1]
    assert [rollout.response_ids for rollout in together] == [rollout.response_ids for rollout in apart]
    assert [rollout.response_ids for rollout in together] == [rollout.response_ids for rollout in shuffled]
    assert [rollout.request for rollout in together] == requests
    assert {rollout.finish_reason for rollout in together} == {"stop", "length"}  # compaction was exercised


def test_a_response_does_not_depend_on_how_others_are_drawn(model: Qwen3ForCausalLM) -> None:
    plain = [request(seed) for seed in range(12)]
    narrow = [request(seed, temperature=0.7, top_k=5, top_p=0.9, presence_penalty=0.5) for seed in range(100, 112)]
    mixed = sampler(model, batch=8).generate([one for pair in zip(plain, narrow, strict=True) for one in pair])
    assert [one.response_ids for one in mixed[::2]] == [one.response_ids for one in sampler(model).generate(plain)]
    assert [one.response_ids for one in mixed[1::2]] == [one.response_ids for one in sampler(model).generate(narrow)]


def test_a_request_that_waits_takes_the_place_of_one_that_ended(model: Qwen3ForCausalLM) -> None:
    """Passes over the model: 8 places, 32 responses, of which every eighth is long. Batches one after the other would
    take the long one's length each, 4 x 40."""
    requests = [request(seed, max_new_tokens=40 if seed % 8 == 0 else 5) for seed in range(32)]
    passes: list[int] = []

    def count(module: object, arguments: object, keywords: dict[str, torch.Tensor]) -> None:
        passes.append(len(keywords["input_ids"]))

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        rollouts = endless(model, batch=8).generate(requests)
    finally:
        hook.remove()
    assert [len(rollout.response_ids) for rollout in rollouts] == [one.sampling.max_new_tokens for one in requests]
    # Four long ones at once, and beside them 28 short ones on four places.
    assert len(passes) == 40


def test_no_more_rows_than_the_cache_has_tokens_for(model: Qwen3ForCausalLM) -> None:
    requests = [request(seed, max_new_tokens=12) for seed in range(9)]  # 17 tokens each at their limit
    most: list[int] = []
    ours = TransformersSampler(model, TinyEncoder(), speaker="student", cache_tokens=60)  # type: ignore[arg-type]
    hook = model.get_decoder().norm.register_forward_hook(lambda _, inputs, output: most.append(len(output)))
    try:
        together = ours.generate(requests)
    finally:
        hook.remove()
    assert [one.response_ids for one in together] == [one.response_ids for one in sampler(model).generate(requests)]
    assert max(most) <= 3 * 5  # the prompts of three rows


@pytest.mark.parametrize("long_ones", ["first", "last"])
def test_the_cache_stays_within_its_tokens_beside_rows_of_other_lengths(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, long_ones: str
) -> None:
    rooms: list[int] = []

    class Watched(SlotCache):
        def reserve(self, num_slots: int, num_places: int, *, most_places: int) -> None:
            super().reserve(num_slots, num_places, most_places=most_places)
            held = self.keys[0].shape if self.keys else (self._num_slots, 0, self.num_places)
            rooms.append(held[0] * held[2])

    monkeypatch.setattr("distill.sampler.SlotCache", Watched)
    if long_ones == "first":
        requests = [request(seed, max_new_tokens=95 if seed < 2 else 5) for seed in range(40)]
    else:  # by their prompts: those who may speak longest begin
        requests = [request(seed, length=90 if seed >= 38 else 3, max_new_tokens=5) for seed in range(40)]
    ours = TransformersSampler(model, TinyEncoder(), speaker="student", cache_tokens=200)  # type: ignore[arg-type]
    together = ours.generate(requests)
    assert max(rooms) <= 200
    assert [one.response_ids for one in together] == [one.response_ids for one in sampler(model).generate(requests)]


def test_prompts_that_are_too_many_for_one_pass_join_in_the_next_ones(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.sampler.PREFILL_TOKENS", 12)
    requests = [request(seed, max_new_tokens=30) for seed in range(8)]  # prompts of 5 tokens: two a pass
    tokens: list[int] = []
    hook = model.get_decoder().norm.register_forward_hook(lambda _, inputs, output: tokens.append(len(output)))
    try:
        together = endless(model).generate(requests)
    finally:
        hook.remove()
    assert tokens[:4] == [10, 2 + 10, 4 + 10, 6 + 10]  # nobody has ended yet, and nobody waits for that
    monkeypatch.undo()
    assert [one.response_ids for one in together] == [one.response_ids for one in endless(model).generate(requests)]


def test_a_row_that_has_ended_makes_no_room_for_itself(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long prompt's response ends at once, and stays in a batch that does not settle for one in forty."""
    places: list[int] = []

    class Watched(SlotCache):
        def reserve(self, num_slots: int, num_places: int, *, most_places: int) -> None:
            assert num_places <= most_places
            places.append(num_places)
            super().reserve(num_slots, num_places, most_places=most_places)

    monkeypatch.setattr("distill.sampler.SlotCache", Watched)
    requests = [request(0, length=50, max_new_tokens=2), *(request(seed, max_new_tokens=40) for seed in range(1, 41))]
    together = endless(model).generate(requests)
    assert max(places) == 52
    apart = [endless(model).generate([one])[0] for one in requests]
    assert [one.response_ids for one in together] == [one.response_ids for one in apart]


def test_samples_of_one_prompt_read_it_once(model: Qwen3ForCausalLM) -> None:
    def asked(seed: int) -> Request:
        return Request(Prompt(()), "think", "hard", tuple(range(1, 15)), Sampling(max_new_tokens=6), seed)

    tokens: list[int] = []
    hook = model.get_decoder().norm.register_forward_hook(lambda _, inputs, output: tokens.append(len(output)))
    try:
        together = sampler(model).generate([asked(seed) for seed in range(8)])
    finally:
        hook.remove()
    assert tokens[0] == 14
    assert [one.response_ids for one in together] == [
        sampler(model).generate([asked(seed)])[0].response_ids for seed in range(8)
    ]
    assert len({one.response_ids for one in together}) == 8


def test_log_probabilities_are_the_models_own_at_temperature_one(model: Qwen3ForCausalLM) -> None:
    requests = [request(seed, length=2 + seed, temperature=0.7, top_k=5, top_p=0.9) for seed in range(8)]
    for rollout in sampler(model).generate(requests):
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        logprobs = model(ids).logits[0].log_softmax(-1)
        first = len(rollout.prompt_ids) - 1
        expected = [float(logprobs[first + place, token].detach()) for place, token in enumerate(rollout.response_ids)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_stop_token_is_part_of_the_response_and_ends_it(model: Qwen3ForCausalLM) -> None:
    rollouts = sampler(model).generate([request(seed, max_new_tokens=60) for seed in range(30)])
    for rollout in rollouts:
        stops = [token in TinyEncoder.stop_ids for token in rollout.response_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 60


def test_thinking_budget_forces_the_early_stop_string_once(model: Qwen3ForCausalLM) -> None:
    # The prompt does not hold the opening tag: the response must open its block itself for a budget to count.
    opened = next(
        seed
        for seed in range(2000)
        if OPEN in sampler(model).generate([request(seed)])[0].response_ids[:3]
        and CLOSE not in sampler(model).generate([request(seed)])[0].response_ids[:6]
        and len(sampler(model).generate([request(seed)])[0].response_ids) >= 6
    )
    free = sampler(model).generate([request(opened, max_new_tokens=30)])[0]
    cut = sampler(model).generate([request(opened, max_new_tokens=30, thinking_budget=4)])[0]
    assert cut.response_ids[:4] == free.response_ids[:4]
    assert cut.response_ids[4:8] == EARLY_STOP
    assert cut.forced[:9] == (False,) * 4 + (True,) * 4 + (False,) * (len(cut.forced[:9]) - 8)
    assert sum(cut.forced) == len(EARLY_STOP)
    assert cut.loss_mask[4:8] == (False,) * 4


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ((5, STOP, 6, OPEN), True),
        ((5, STOP, CLOSE, OPEN, 6), True),
        ((5, STOP, OPEN, 6, CLOSE, 7), False),
        ((5, OPEN, STOP, 6), False),  # an earlier turn's
    ],
)
def test_a_budget_counts_for_thinking_that_the_prompt_has_opened(
    model: Qwen3ForCausalLM, prompt: tuple[int, ...], counts: bool
) -> None:
    def asked(seed: int, budget: int | None) -> Request:
        return replace(request(seed, max_new_tokens=30, thinking_budget=budget), prompt_ids=prompt)

    free = sampler(model).generate([asked(seed, None) for seed in range(40)])
    # Those without a mark of their own: the prompt's decides.
    chosen = [one for one in free if len(one.response_ids) > 4 and not {OPEN, CLOSE} & set(one.response_ids)]
    assert len(chosen) > 2
    for one, cut in zip(chosen, sampler(model).generate([asked(one.request.seed, 4) for one in chosen]), strict=True):
        if counts:
            assert cut.response_ids[:8] == one.response_ids[:4] + EARLY_STOP
            assert cut.forced[:8] == (False,) * 4 + (True,) * 4
        else:
            assert cut.response_ids == one.response_ids
            assert not any(cut.forced)


def test_drawn_frequencies_follow_temperature_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))
    uniform = torch.linspace(0, 1, 20001)[:-1]
    cases = [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 1000}, [0.4, 0.3, 0.15, 0.1, 0.05]),  # more than there are
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),  # the smallest set whose mass reaches 0.7
        ({"top_p": 0.71}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        ({"temperature": 0.5}, [value**2 / 0.285 for value in (0.4, 0.3, 0.15, 0.1, 0.05)]),
        ({"top_k": 4, "top_p": 0.9}, [8 / 19, 6 / 19, 3 / 19, 2 / 19, 0]),  # top-p acts on what top-k left
    ]
    for sampling, expected in cases:
        draw = Draw.of([request(0, **sampling).sampling], 5, torch.device("cpu"))
        tokens = torch.cat([draw(logits[None], value[None])[0] for value in uniform[:: 20 if not sampling else 10]])
        observed = torch.bincount(tokens, minlength=5).double() / len(tokens)
        assert observed.tolist() == pytest.approx(expected, abs=2e-3), sampling


def test_the_lowest_temperature_takes_the_most_probable_token() -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.000001"):
        SamplingSettings(temperature=1e-39)  # less than float32 divides by
    coldest = SamplingSettings(temperature=COLDEST).sampling()
    for scale in (1.0, 1e4, 1e30):
        logits = scale * torch.tensor([[-1.0, 1.0, 0.999]])
        for value in (0.0, 0.5, 0.999):
            draw = Draw.of([coldest], 3, torch.device("cpu"))
            assert int(draw(logits, torch.tensor([value]))[0]) == 1


def test_presence_penalty_is_subtracted_once_from_what_was_said() -> None:
    draw = Draw.of([request(0, presence_penalty=1.5).sampling], 3, torch.device("cpu"))
    draw.remember(torch.tensor([1]))
    draw.remember(torch.tensor([1]))
    logits = torch.tensor([[0.0, 1.5, -40.0]])
    # After the penalty the first two are equally likely, so the draw changes over at one half; reported is the raw one.
    assert [int(draw(logits, torch.tensor([u]))[0]) for u in (0.0, 0.49, 0.51, 0.99)] == [0, 0, 1, 1]
    assert float(draw(logits, torch.tensor([0.0]))[1][0, 1]) == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_inverse_transform_never_lands_on_weight_zero() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for value, expected in ((0.0, 1), (0.499, 1), (0.501, 3), (1.0, 3), (0.99999999, 3)):
        assert int(inverse_transform(weights, torch.tensor([value]))) == expected
