"""TRL's side of ``benchmarks.on_policy_step``: a script for TRL's environment that imports nothing of this project.

Reads the task as JSON from standard input and prints ``{"tokens_per_second": x, "seconds_by_phase": {...}}``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """When each optimiser step ended; a step, its data included, lasts from one end to the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def now() -> float:
    """The time, when a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Has every call of ``owner.name`` add its time to ``seconds``."""
    call: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = now()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(now() - started)

    setattr(owner, name, wrapped)


def main() -> None:
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(trainer_of(task, folder), warmup=task["warmup"])))


def trainer_of(task: dict[str, Any], folder: str) -> DistillationTrainer:
    """TRL's trainer for the task; it writes to ``folder``."""
    return DistillationTrainer(
        model=model_of(task, task["student"], 1),
        teacher_model=model_of(task, task["teacher"], 0),
        args=DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=task["batch"],
            gradient_accumulation_steps=1,
            max_steps=task["steps"] + task["warmup"],
            max_completion_length=task["max_new"],
            learning_rate=1e-4,
            beta=1.0,
            bf16=task["dtype"] == "bfloat16",
            use_cpu=task["device"] == "cpu",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [sentence(ids) for ids in task["prompts"]]}),
        processing_class=tokenizer_of(task),
    )


def model_of(task: dict[str, Any], shape: dict[str, int], seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=shape["tied"],
        eos_token_id=task["stop"],
        pad_token_id=0,
    )
    with torch.device(task["device"]):
        return Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, task["dtype"]))


def tokenizer_of(task: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A word a token: w0, w1, ..."""
    words = {f"w{place}": place for place in range(task["student"]["vocabulary"])}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{task['stop']}", pad_token="w0")


def sentence(ids: list[int]) -> str:
    """What ``tokenizer_of`` reads as ``ids``."""
    return " ".join(f"w{place}" for place in ids)


def measure(trainer: DistillationTrainer, *, warmup: int) -> dict[str, Any]:
    """Train, and look at the clock meanwhile."""
    seconds: dict[str, list[float]] = {"sample": [], "score": []}
    lengths: list[int] = []
    generate = trainer._generate_single_turn

    def counted(*args: Any, **kwargs: Any) -> Any:
        said = generate(*args, **kwargs)
        lengths.append(sum(map(len, said)))
        return said

    trainer._generate_single_turn = counted
    timed(trainer, "_generate_single_turn", seconds["sample"])
    timed(trainer.teacher_model.base_model, "forward", seconds["score"])
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    walls = [after - before for before, after in pairwise(clock.ends)][warmup - 1 :]
    rates = [length / wall for length, wall in zip(lengths[warmup:], walls, strict=True)]
    wall, sample, score = (statistics.median(x) for x in (walls, seconds["sample"], seconds["score"]))
    phases = {"sample": sample, "score": score, "train": wall - sample - score}
    return {"tokens_per_second": statistics.median(rates), "seconds_by_phase": phases}


if __name__ == "__main__":
    main()
