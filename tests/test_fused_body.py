"""A model in fewer operations: the folded way against its modules in float64, the faithful one to their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill import fused_body as module
from distill import packed_linears as packing_module
from distill.attention import PACKED, Packing
from distill.fused_body import fused_body
from distill.kv_cache import Decoding, Group, SlotCache
from distill.packed_linears import PackedLinears, packed_linears

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not packing_module._can_pack(dtype), reason="oneDNN has no such products")
    )
    for dtype in (torch.float32, torch.bfloat16)
]
OPTIONS: list[dict[str, Any]] = [
    {},
    # Epsilon is as large as what it is added to.
    {"rms_norm_eps": 0.5},
    # Cosine and sine are scaled.
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
]


def random_model(**options: Any) -> Qwen3ForCausalLM:
    """Its norms' weights too: in a new model they are 1, and any use of them would look right."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.3, 2.0)
    model.set_attn_implementation(PACKED)
    return model


def passes(call: Callable[[Tensor, Tensor, SlotCache, Decoding, Packing | None], Tensor], dtype: torch.dtype) -> Tensor:
    """Hidden states of two prompts that are read, of three tokens more each, and of a pass that reads a third prompt
    beside them: 7 + 4 + 6 + 2 + 5 rows."""
    cache, seen = SlotCache(), []
    cache.reserve(3, 16, most_places=16)

    def one(ids: list[int], places: list[int], num_decoding: int, lengths: list[int]) -> None:
        slots = [*range(num_decoding), *(num_decoding + n for n, length in enumerate(lengths) for _ in range(length))]
        place_T = torch.tensor(places)
        cache.expect(torch.tensor(slots), place_T, torch.arange(len(ids)))
        decoding = Decoding.of(cache, [Group(0, num_decoding, 12)], place_T[:num_decoding], dtype)
        packing = Packing.of(lengths, torch.device("cpu")) if lengths else None
        seen.append(call(torch.tensor(ids), place_T, cache, decoding, packing))

    one([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [*range(7), *range(4)], 0, [7, 4])
    for step in range(3):
        one([8 + step, 20 + step], [7 + step, 4 + step], 2, [])
    one([11, 12, 30, 31, 32, 33, 34], [10, 7, *range(5)], 2, [5])
    return torch.cat(seen)


def by_modules(model: PreTrainedModel) -> Callable[..., Tensor]:
    def call(id_T: Tensor, position_T: Tensor, cache: SlotCache, decoding: Decoding, packing: Any) -> Tensor:
        states = model.get_decoder()(
            input_ids=id_T[:, None],
            position_ids=position_T[:, None],
            past_key_values=cache,
            use_cache=True,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            packing=packing,
            decoding=decoding,
        )
        found: Tensor = states.last_hidden_state[:, 0]
        return found

    return call


def fused(model: PreTrainedModel, packed: PackedLinears | None = None) -> Callable[..., Tensor]:
    body = fused_body(model, packed)
    assert body is not None
    return lambda id_T, position_T, cache, decoding, packing: body(id_T, position_T, decoding, packing)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_its_states_are_those_of_the_modules(options: dict[str, Any]) -> None:
    model = random_model(**options)
    found = passes(fused(model), torch.float32)
    modules = passes(by_modules(model), torch.float32)
    exact = passes(by_modules(model.double()), torch.float64)
    error, theirs = ((states - exact).abs().max().item() for states in (found, modules))
    assert error < 2 * theirs < 1e-4


@torch.no_grad()
def test_states_of_zero_stay_finite() -> None:
    model = random_model()
    model.get_input_embeddings().weight.zero_()
    assert (passes(fused(model), torch.float32) == 0).all()


@torch.no_grad()
def test_it_is_made_of_the_weights_of_the_moment() -> None:
    model = random_model()
    before = passes(fused(model), torch.float32)
    for weight in model.parameters():
        weight.mul_(1.1)
    after = passes(fused(model), torch.float32)
    assert (after - passes(by_modules(model), torch.float32)).abs().max() < 1e-4 < (after - before).abs().max()


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as small as these have their weights put in order too, and are not folded."""
    monkeypatch.setattr(packing_module, "PACKED_FROM", 0)
    monkeypatch.setattr(module, "FOLDED_PARAMETERS", 0)


@torch.no_grad()
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_with_ordered_weights_its_bits_are_those_of_the_modules(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = random_model(**options).to(dtype)
    packed = packed_linears(model)
    assert packed is not None
    found = passes(fused(model, packed), dtype)
    with packed.in_use():
        modules = passes(by_modules(model), dtype)
    assert found.dtype == dtype and found.isfinite().all() and torch.equal(found, modules)


@pytest.mark.usefixtures("every_size")
def test_a_model_of_two_precisions_is_left_to_its_modules() -> None:
    """Such a norm's product is in the wider one, and such a product is not put in order."""
    for part in ("input_layernorm", "mlp.up_proj"):
        model = random_model()
        packed = packed_linears(model)
        assert fused_body(model, packed) is not None
        model.get_decoder().layers[1].get_submodule(part).bfloat16()
        assert fused_body(model, packed_linears(model)) is None


def test_any_other_model_is_left_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_body(random_model(), None) is not None
    assert fused_body(random_model().bfloat16(), None) is None
    assert fused_body(random_model().double(), None) is None
    assert fused_body(random_model().to("meta"), None) is None
    assert fused_body(random_model(attention_bias=True), None) is None
    assert fused_body(random_model(hidden_act="gelu"), None) is None

    watched = random_model()
    watched.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: None)
    assert fused_body(watched, None) is None

    replaced = random_model()
    replaced.get_decoder().layers[1].mlp.up_proj.forward = lambda x: x
    assert fused_body(replaced, None) is None

    adapted = random_model()
    get_peft_model(adapted, LoraConfig(target_modules=["q_proj"]))
    assert fused_body(adapted, None) is None

    experts = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert fused_body(Qwen3MoeForCausalLM(experts), None) is None

    monkeypatch.setattr(module, "FOLDED_PARAMETERS", 1000)
    assert fused_body(random_model(), None) is None


def test_a_student_that_recomputes_its_activations_is_decoded_by_it() -> None:
    model = random_model()
    model.enable_input_require_grads()  # a hook on the embedding, which is called as a module
    assert fused_body(model, None) is not None
