"""A model on disk: opened, checked and identified before any of its weights are read into memory.

``open_checkpoint`` turns what the user named into a folder whose configuration describes a Qwen3 model and whose
safetensors files are whole. Left out on purpose: pickled weights, code that comes with a model, and files that were
never asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError, UserError
from distill.family import ModelSource, Shape, shape_in
from distill.weights import fingerprint, first_line, read_object, validate_safetensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""What is downloaded of a model on the hub."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's folder that was found whole.

    ``revision`` is the hub's commit, or for a local folder a SHA-256 of its configuration and weights: equal weights
    have an equal revision wherever they lie. ``weight_files`` maps each tensor's name to the file that holds it.
    ``stop_ids`` are the token ids on which the model's own generation configuration ends a response.
    """

    source: ModelSource
    path: Path
    config: Mapping[str, Any]
    shape: Shape
    revision: str
    stop_ids: tuple[int, ...]
    max_positions: int
    weight_files: Mapping[str, Path]

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """The number type that it says its weights are in, by torch's name; float32 where it does not say."""
        said = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return str(said).removeprefix("torch.")


def open_checkpoint(source: ModelSource, *, download: bool = True) -> Checkpoint:
    """The checked checkpoint that ``source`` names, downloaded first where it is on the hub and ``download`` is true.

    Raises UserError for a model that cannot be had, is not of the Qwen3 family or is incomplete; DistillError where
    a download breaks off.
    """
    is_hub = source.kind == "hub"
    path = _download(source.location, source.revision, offline=not download) if is_hub else Path(source.location)
    config, shape, weight_files = read_folder(path)
    return Checkpoint(
        source=source,
        path=path,
        config=config,
        shape=shape,
        # The hub's cache names the folder of a snapshot after its commit.
        revision=path.name if is_hub else fingerprint(config, weight_files),
        stop_ids=_stop_ids(path, config),
        max_positions=_positive(path, config, "max_position_embeddings"),
        weight_files=weight_files,
    )


def read_folder(path: Path) -> tuple[dict[str, Any], Shape, dict[str, Path]]:
    """Configuration, shape and weight files of the model in ``path``; of the weights headers alone are read.

    Raises UserError for a folder that holds no whole model of the Qwen3 family.
    """
    config = read_object(path / "config.json", f"{path} is no model folder")
    return config, shape_in(config, path / "config.json"), validate_safetensors(path)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises UserError where it has none that can be read."""
    return tokenizer_in(checkpoint.path)


def open_tokenizer(source: ModelSource) -> tuple[PreTrainedTokenizerBase, Shape | None]:
    """The tokenizer that ``source`` names, and its model's shape where a config.json is there; no weights are needed.

    Raises UserError for a tokenizer that cannot be had, DistillError where a download breaks off.
    """
    patterns = [pattern for pattern in WANTED_FILES if pattern != "*.safetensors"]
    path = _download(source.location, source.revision, patterns) if source.kind == "hub" else Path(source.location)
    config = path / "config.json"
    return tokenizer_in(path), shape_in(read_object(config, ""), config) if config.is_file() else None


def tokenizer_in(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in ``path``. Raises UserError where there is none that can be read."""
    from transformers import AutoTokenizer

    # Without these files transformers would make up an empty tokenizer of the model's type.
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((path / name).is_file() for name in form) for form in forms):
        raise UserError(f"{path} has no tokenizer.json; save the model's tokenizer there too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # `tokenizers` reports what it cannot parse as a bare Exception.
    except Exception as error:
        raise UserError(
            f"the tokenizer in {path} cannot be read ({first_line(error)}); copy or download its tokenizer files again"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{path} has no tokenizer.json; save the tokenizer there in its fast form")
    return tokenizer


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """The whole model in evaluation mode, every weight from the checkpoint.

    Raises UserError where the files and the configuration do not describe the same model: a weight is never left at
    random.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{checkpoint.path / 'config.json'} is refused by transformers: {why}") from None
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        config=config,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    problems = {
        "lacks": info["missing_keys"],
        "has no place for": info["unexpected_keys"],
        "has in another shape": info["mismatched_keys"],
    }
    found = [f"{verb} {_some(names)}" for verb, names in problems.items() if names]
    if found:
        raise UserError(
            f"the weights in {checkpoint.path} do not fit its config.json: the model {', and '.join(found)}; "
            f"copy or download the folder again, or point to the folder that was saved whole"
        )
    return model


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same numbers, wherever they lie and in however many files.

    Where their number types differ, in the coarser one. Reads up to the first tensor that differs.
    """
    if one.revision == other.revision:
        return True
    if one.shape != other.shape or one.weight_files.keys() != other.weight_files.keys():
        return False
    return all(_same_tensor(name, one.weight_files[name], other.weight_files[name]) for name in one.weight_files)


def _same_tensor(name: str, one: Path, other: Path) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        pair: tuple[Tensor, Tensor] = (first.get_tensor(name), second.get_tensor(name))
    coarser = min(pair, key=lambda tensor: tensor.dtype.itemsize).dtype
    return pair[0].shape == pair[1].shape and torch.equal(*(tensor.to(coarser) for tensor in pair))


def lm_head(checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
    """The matrix [vocabulary rows, width] that makes logits of hidden states, read alone from its file.

    For tied models this is the embedding. Raises UserError where the checkpoint lacks it or it is quantised.
    """
    name = "model.embed_tokens.weight" if checkpoint.shape.tied else "lm_head.weight"
    return _tensor(checkpoint, name, (checkpoint.shape.vocabulary, checkpoint.shape.width)).to(dtype)


def final_norm(checkpoint: Checkpoint) -> Tensor:
    """The weight [width] of the norm before the LM head, in float32, read alone from its file."""
    import torch

    return _tensor(checkpoint, "model.norm.weight", (checkpoint.shape.width,)).to(torch.float32)


def _tensor(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> Tensor:
    from safetensors import safe_open

    if name not in checkpoint.weight_files:
        raise UserError(f"the weights in {checkpoint.path} lack {name}; copy or download the folder again")
    file = checkpoint.weight_files[name]
    with safe_open(file, framework="pt", device="cpu") as shard:
        tensor: Tensor = shard.get_tensor(name)
    if tuple(tensor.shape) != expected or tensor.dtype.itemsize < 2:
        raise UserError(
            f"{name} in {file} is {tuple(tensor.shape)} of {tensor.dtype}, and {expected} in 16 or 32 bits is needed; "
            f"take a checkpoint in which it is not quantised"
        )
    return tensor


def family_stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of ``<|endoftext|>`` and ``<|im_end|>``, 151643 and 151645 in Qwen3; together they are one action."""
    from distill.chat import END_OF_TEXT, IM_END

    vocabulary = tokenizer.get_vocab()
    for token in (END_OF_TEXT, IM_END):
        if token not in vocabulary:
            raise UserError(f"the tokenizer has no token {token}; models of the Qwen3 family do: take one of those")
    return vocabulary[END_OF_TEXT], vocabulary[IM_END]


def _download(
    hub_id: str, revision: str | None, patterns: Sequence[str] = WANTED_FILES, *, offline: bool = False
) -> Path:
    from huggingface_hub import errors, snapshot_download

    what = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{what} is gated: accept its licence on https://huggingface.co/{hub_id}, then log in with "
            f"`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {hub_id}, or does not show it to you; check the spelling, "
            f"or log in with `hf auth login` if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{hub_id} has no revision {revision}; name a branch, a tag or a commit of it") from None
    except errors.HFValidationError as error:
        raise UserError(f"{hub_id!r} is no hub id ({first_line(error)}); write owner/name or a folder") from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{what} is not complete in the cache and the hub cannot be reached ({first_line(error.__cause__)}); "
            f"give a local folder instead, point HF_HOME to a cache that holds the model, "
            f"or run once with a connection (for a gated model after `hf auth login`)"
        ) from None
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise DistillError(
            f"the download of {what} failed: {first_line(error)}; what has arrived is kept and the same command "
            f"goes on from there, and with HF_HUB_OFFLINE=1 a model in the cache is used without asking the hub"
        ) from error


def _positive(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path / 'config.json'} gives {value!r} for {key}; it is a whole number of tokens")
    return value


def _stop_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json; where that says nothing, of config.json, as transformers does it."""
    file = path / "generation_config.json"
    generation = read_object(file, str(path)) if file.is_file() else {}
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(value, int) for value in ids):
        raise UserError(f"{path} gives {found!r} as eos_token_id; it is a token id or a list of them")
    return tuple(ids)


def _some(names: object) -> str:
    """The first few names of a set that may be long; a mismatch comes as (name, shape, shape)."""
    assert isinstance(names, set | list | tuple)
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
