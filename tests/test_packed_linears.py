"""Products with weights in oneDNN's order against the model's own."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.sampler import Ids
from distill import packed_linears as module
from distill.encode import Encoder
from distill.packed_linears import PackedLinears, packed_linears
from distill.sampler import TransformersSampler
from distill.types import Prompt, Request, Rollout, Sampling

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


pytestmark = pytest.mark.skipif(not module._can_pack(torch.float32), reason="this torch is built without oneDNN")
in_16_bits = pytest.mark.skipif(
    not module._can_pack(torch.bfloat16), reason="oneDNN has no products in bfloat16 for this processor"
)


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKED_FROM", 0)


def random_model(dtype: torch.dtype = torch.float32, **options: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **options)).eval().to(dtype)


def packed(model: Any) -> PackedLinears:
    found = packed_linears(model)
    assert found is not None
    return found


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (16, 1), (1, 33), (1100,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (37, 51), (1, 3), (300, 1)])
def test_a_product_is_exact_to_rounding(rows: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(*rows, inputs)
    with PackedLinears([linear]).in_use():
        found = linear(x)
    exact = linear.double()(x.double())
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-5


@in_16_bits
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_in_16_bits_a_product_is_rounded_once(rows: int) -> None:
    """Sums in 16 bits would make the log-probabilities of sampling others than those of training."""
    torch.manual_seed(0)
    linear, x = nn.Linear(1024, 512, bias=False).bfloat16(), torch.randn(rows, 1024).bfloat16()
    with PackedLinears([linear]).in_use():
        found = linear(x)
    exact = x.double() @ linear.weight.double().t()
    # Half of the last of eight binary digits, and what sums in float32 are off.
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@torch.no_grad()
def test_it_has_the_weights_of_its_making_and_only_within() -> None:
    model = random_model()
    ids = torch.tensor([[1, 2, 3]])
    products, before = packed(model), model(ids).logits
    for weight in model.parameters():
        weight.mul_(1.1)
    with products.in_use():
        stale = model(ids).logits
    after = model(ids).logits
    # Norms and embedding have the new weights.
    assert not torch.allclose(stale, after, atol=1e-3) and not torch.allclose(stale, before, atol=1e-3)
    with packed(model).in_use():
        assert torch.allclose(model(ids).logits, after, atol=1e-5)


def test_an_error_within_leaves_the_layers_as_they_were() -> None:
    model = random_model()
    with pytest.raises(KeyboardInterrupt), packed(model).in_use():
        raise KeyboardInterrupt
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@torch.no_grad()
def test_adapters_speak_too() -> None:
    model = random_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = torch.tensor([[1, 2, 3]])
    expected = adapted(ids).logits
    with adapted.disable_adapter():
        base = adapted(ids).logits
    with packed(model).in_use():
        found = adapted(ids).logits
    assert (found - expected).abs().max() < 1e-5 < (found - base).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_16_bits)])
def test_a_sampler_decodes_with_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(dtype)
    request = Request(
        Prompt(({"role": "user", "content": "x"},)), "no_think", "hard", (1, 2, 3), Sampling(max_new_tokens=5), 0
    )
    requests = [request, Request(request.prompt, "no_think", "hard", (4, 5), Sampling(max_new_tokens=8), 1)]
    applied = 0
    own = module._apply

    def counted(*words: Any) -> torch.Tensor:
        nonlocal applied
        applied += 1
        return own(*words)

    def sampled() -> list[Rollout]:
        return TransformersSampler(model, cast(Encoder, Ids()), speaker="student", batch=2).generate(requests)

    monkeypatch.setattr(module, "_apply", counted)
    monkeypatch.setattr("distill.sampler.fused_body", lambda model, packed: None)
    with_them = sampled()
    # Seven a layer and the head, in eight passes.
    assert applied == 8 * (7 * 2 + 1)
    monkeypatch.setattr(module, "PACKED_FROM", 10**9)
    without = sampled()
    assert applied == 8 * (7 * 2 + 1)
    assert [one.response_ids for one in with_them] == [one.response_ids for one in without]
    for one, other in zip(with_them, without, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_any_other_model_is_decoded_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_linears(random_model(torch.float64)) is None
    assert packed_linears(random_model().to("meta")) is None
    experts = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert packed_linears(Qwen3MoeForCausalLM(experts)) is None

    model = random_model()
    num_bytes = 4 * sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    monkeypatch.setattr(module, "COPIED_BYTES", num_bytes)
    assert packed_linears(model) is not None
    monkeypatch.setattr(module, "COPIED_BYTES", num_bytes - 1)
    assert packed_linears(model) is None
    monkeypatch.setattr(module, "COPIED_BYTES", num_bytes)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert packed_linears(model) is None
