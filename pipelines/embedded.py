"""Builds the embedded checkpoints: `python -m pipelines.embedded --out DIR [--only NAME] [--check]`.

Every number is drawn from one seed a model. The same machine, libraries and number of threads give the same bits
again; others may round sums differently, and training amplifies that: expect the scores, not the bytes. `--check`
trains nothing and prints the scores of the checkpoints in DIR as one JSON document.
"""

import argparse
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from distill.chat import END_OF_TEXT, IM_END
from distill.embedded import NAMES
from distill.embedded.lessons import Lesson, chat_lesson, document, plain_lesson
from distill.embedded.tokenizer import VOCAB_ROWS, build_tokenizer
from pipelines.embedded_check import check_student, check_teacher

Batches = Iterator[Sequence[Lesson]]


@dataclass(frozen=True, slots=True)
class Training:
    """How one embedded model is trained."""

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup: int = 40
    seed: int = 0
    answers_from: float = 1.0
    """Share of the steps after which a lesson of n trained tokens weighs sqrt(n) instead of n."""

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine to a fiftieth of the peak."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.num_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True, slots=True)
class Recipe:
    """An embedded model: its shape, its lessons, its training, and what a run of its check says."""

    model: Callable[[], PreTrainedModel]
    batches: Callable[[PreTrainedTokenizerBase, Training], Batches]
    training: Training
    stop_tokens: tuple[str, ...]
    check: Callable[[Path], dict[str, Any]]


def build(name: str, directory: Path, *, num_steps: int | None = None) -> None:
    """Train the model called `name` and store it, in bf16, as a transformers directory."""
    recipe = RECIPES[name]
    training = recipe.training
    torch.manual_seed(training.seed)
    tokenizer = build_tokenizer()
    model = recipe.model()
    train(model, recipe.batches(tokenizer, training), training, num_steps or training.num_steps)
    store(model, tokenizer, recipe.stop_tokens, directory)


def store(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str], directory: Path
) -> None:
    """Write a transformers directory, weights in bf16. `stop_tokens` end a response; the first is the model's own."""
    vocab = tokenizer.get_vocab()
    stop_ids = [vocab[token] for token in stop_tokens]
    model.config.eos_token_id = stop_ids[0]
    model.config.pad_token_id = vocab[END_OF_TEXT]
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
    )
    model.bfloat16().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # saved for its owner alone, unlike the files beside it
    tokenizer.save_pretrained(directory)


def train(model: PreTrainedModel, batches: Batches, training: Training, num_steps: int) -> None:
    """Plain next-token training with AdamW, in place, in fp32. The loss of a step goes to standard error."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=training.weight_decay
    )
    model.train()
    for step in range(num_steps):
        lessons = sorted(next(batches), key=lambda lesson: len(lesson.ids))
        power = 1.0 if step < training.answers_from * num_steps else 0.5
        total_weight = sum(sum(lesson.trained) ** power for lesson in lessons)
        cut = len(lessons) * 5 // 8  # two parts by length: the short ones are spared the padding of the long ones
        loss = 0.0
        for part in (lessons[:cut], lessons[cut:]):
            part_loss = _loss(model, part, power) / total_weight
            part_loss.backward()
            loss += part_loss.item()
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == num_steps - 1:
            print(f"step {step} loss {loss:.4f}", file=sys.stderr, flush=True)
    model.eval()


def chat_batches(tokenizer: PreTrainedTokenizerBase, training: Training) -> Batches:
    """Endless batches of conversations: at first nearly all plain, from a third of the training on nearly none.

    With the whole mixture from the start it is a matter of luck whether a model learns to chain more than two steps.
    """
    rng = random.Random(training.seed)
    for step in itertools.count():
        plain_share = max(0.1, 1.0 - step / (0.33 * training.num_steps))
        makers = [plain_lesson if rng.random() < plain_share else chat_lesson for _ in range(training.batch_size)]
        yield [maker(rng, tokenizer) for maker in makers]


def document_batches(tokenizer: PreTrainedTokenizerBase, training: Training) -> Batches:
    """Endless batches of raw text: one to three documents in a row, every token trained."""
    rng = random.Random(training.seed)
    while True:
        texts = ["".join(document(rng) for _ in range(rng.randint(1, 3))) for _ in range(training.batch_size)]
        rows = [tokenizer.encode(END_OF_TEXT + text) for text in texts]
        yield [Lesson(tuple(row), (True,) * len(row)) for row in rows]


def _loss(model: PreTrainedModel, lessons: Sequence[Lesson], power: float) -> torch.Tensor:
    """Cross-entropy over the trained tokens, a sum in which a lesson of n of them weighs n ** power.

    At power 1 every token counts the same and thinking is learned fast; the two tokens of an answer without thinking
    are hardly heard. At 0.5 they are, but a model that starts so learns to think slowly.
    """
    length = max(len(lesson.ids) for lesson in lessons)
    ids_BT = torch.tensor([[*lesson.ids, *[0] * (length - len(lesson.ids))] for lesson in lessons])
    mask_BT = torch.tensor([[*lesson.trained, *[False] * (length - len(lesson.ids))] for lesson in lessons])
    weight_BT = mask_BT * mask_BT.sum(dim=1, keepdim=True) ** (power - 1.0)
    if isinstance(model, Qwen3MoeForCausalLM):
        output = model(input_ids=ids_BT[:, :-1], use_cache=False, output_router_logits=True)
        # The model's own load-balancing loss: without it one expert would take every token.
        balance = model.router_aux_loss_coef * output.aux_loss * weight_BT.sum()
    else:
        output = model(input_ids=ids_BT[:, :-1], use_cache=False)
        balance = 0.0
    loss_BT = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    loss: torch.Tensor = (loss_BT * weight_BT[:, 1:]).sum() + balance
    return loss


_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_ROWS,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    # Contexts of some 200 tokens: with Qwen3's base of 1e6 most of a head's rotations would stand still.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _tiny() -> PreTrainedModel:
    # 6 heads of 32 are 192, not 160: as in 0.6B and 4B the heads are wider than the model.
    config = Qwen3Config(
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=352,
        **_SHAPE,
    )
    return Qwen3ForCausalLM(config)


def _nano() -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=288,
        **_SHAPE,
    )
    return Qwen3ForCausalLM(config)


def _nano_moe() -> PreTrainedModel:
    # As in 30B-A3B the heads, 4 of 32, are wider than the model.
    config = Qwen3MoeConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        **{**_SHAPE, "head_dim": 32},
    )
    return Qwen3MoeForCausalLM(config)


_INSTRUCT: Final = (IM_END, END_OF_TEXT)
_BASE: Final = (END_OF_TEXT,)

RECIPES: Final = {
    "tiny": Recipe(_tiny, chat_batches, Training(750, 48, 2.5e-3, answers_from=0.35), _INSTRUCT, check_teacher),
    "nano": Recipe(_nano, document_batches, Training(450, 64, 3e-3), _BASE, check_student),
    "nano-moe": Recipe(_nano_moe, document_batches, Training(450, 64, 3e-3), _BASE, check_student),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.embedded", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory that holds a directory for each model")
    parser.add_argument("--only", choices=NAMES, help="one model instead of all")
    parser.add_argument("--check", action="store_true", help="print the scores of what is there; train nothing")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(NAMES)
    if arguments.check:
        print(json.dumps({name: RECIPES[name].check(arguments.out / name) for name in names}, indent=2))
        return
    for name in names:
        build(name, arguments.out / name)


if __name__ == "__main__":
    main()
