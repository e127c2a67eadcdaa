"""vLLM's own reload of a model's layers takes every weight by the names, and in the shapes, that a student gives.

It is the end of each transfer on a GPU, and written for any device; but a CPU's layers pack their weights, so here
they are left as they were loaded. The layers, their loaders and the reload are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_student import MOE, SHAPE
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.model_config import LoraSettings, StudentSettings
from students.student import Student

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

SIZE: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 96}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What of vLLM's process groups a model wants to be made in."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@contextmanager
def vllm_model(folder: Path, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Any]]:
    """vLLM's model of the checkpoint in ``folder``, loaded as on a GPU: nothing is packed behind it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    name = str(dtype).partition(".")[2]
    config = EngineArgs(str(folder), skip_tokenizer_init=True, dtype=name, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config):
        with set_default_torch_dtype(dtype):
            model = initialize_model(config)
        loader: Any = get_model_loader(config.load_config)
        loader.load_weights(model, config.model_config)
        yield model, config.model_config


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for method in (UnquantizedLinearMethod, UnquantizedFusedMoEMethod, UnquantizedEmbeddingMethod):
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)


def transfer(model: nn.Module, config: Any, weights: Iterator[tuple[str, Tensor]], *, at_once: int) -> None:
    """As a worker's engine does between ``start`` and ``finish``: by IPC all together, by NCCL one by one."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    everything = list(weights)
    for first in range(0, len(everything), at_once):
        model.load_weights(everything[first : first + at_once])  # type: ignore[operator]
    finalize_layerwise_reload(model, config)


def student(kind: str, dtype: torch.dtype, lora: LoraSettings | None) -> Student:
    torch.manual_seed(0)
    if kind == "moe":
        made: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **MOE))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**{**SIZE, "tie_word_embeddings": kind == "tied"}))
    name: Any = str(dtype).partition(".")[2]
    settings = StudentSettings(dtype=name, gradient_checkpointing=False, lora=lora)
    return Student(made.to(dtype), settings, stop_ids=[0])


def change(learner: Student, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


CASES = [(kind, lora) for kind in ("tied", "untied", "moe") for lora in (None, LoraSettings(rank=4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "lora"), CASES)
def test_a_reload_puts_the_students_weights_where_a_start_would(
    one_worker: None, tmp_path: Path, kind: str, lora: LoraSettings | None, dtype: torch.dtype
) -> None:
    learner = student(kind, dtype, lora)
    learner.export(tmp_path / "start", learner.weights())
    with vllm_model(tmp_path / "start", dtype) as (model, config):
        before = {name: value.data_ptr() for name, value in model.named_parameters()}
        started = {name: value.clone() for name, value in model.named_parameters()}
        for step in range(2):
            change(learner, step)
            transfer(model, config, learner.merged_weights(), at_once=(1, 1000)[step])
            learner.export(tmp_path / f"{step}", learner.weights())
            with vllm_model(tmp_path / f"{step}", dtype) as (fresh, _):
                wanted = dict(fresh.named_parameters())
            found = dict(model.named_parameters())
            assert found.keys() == wanted.keys() == before.keys()
            for name, value in found.items():
                assert torch.equal(value, wanted[name]), name
                assert lora is not None or not torch.equal(value, started[name]), name
        # Captured passes go on reading where they were captured.
        assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
