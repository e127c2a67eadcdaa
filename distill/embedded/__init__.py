"""Models small enough to ship with the package, so that everything runs and is tested without a network.

`tiny` is a teacher (Qwen3, instruct, both modes), `nano` and `nano-moe` are base students (Qwen3, Qwen3-MoE). All
three are plain transformers directories with one tokenizer; their subject is `distill.embedded.task`.
`python -m pipelines.embedded` builds them. This module imports neither torch nor transformers.
"""

from pathlib import Path
from typing import Final

from distill.errors import UserError

NAMES: Final = ("tiny", "nano", "nano-moe")


def checkpoint_dir(name: str) -> Path:
    """Directory of an embedded checkpoint, for `from_pretrained`.

    >>> checkpoint_dir("tiny").name
    'tiny'

    Raises `UserError` for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise UserError(f"no embedded model is named {name!r}: choose one of {', '.join(NAMES)}")
    return Path(__file__).parent / name
