"""Opening a model folder: whole ones open, broken ones are refused with the sentence that names the file."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill import weights as weights_module
from distill.checkpoint import (
    family_stop_ids,
    lm_head,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from distill.embedded.tokenizer import VOCAB_ROWS, build_tokenizer
from distill.errors import UserError
from distill.family import ModelSource
from distill.weights import validate_safetensors

SHAPE = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 281,
}


def save(folder: Path, *, tied: bool = False, shards: bool = False, moe: bool = False, seed: int = 0) -> Path:
    """A tiny model of random weights with its tokenizer, as transformers saves it."""
    torch.manual_seed(seed)
    model: Qwen3ForCausalLM | Qwen3MoeForCausalLM
    if moe:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, tie_word_embeddings=tied))  # type: ignore[arg-type]
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied))  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    build_tokenizer().save_pretrained(folder)
    return folder


def source(folder: Path) -> ModelSource:
    return ModelSource("mine", "directory", str(folder))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tmp_path / "sharded", shards=True)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tmp_path / "single")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_model_opens_loads_and_gives_its_head(tmp_path: Path, tied: bool, moe: bool, shards: bool) -> None:
    checkpoint = open_checkpoint(source(save(tmp_path, tied=tied, moe=moe, shards=shards)))
    assert len(set(checkpoint.weight_files.values())) > 1 or not shards
    assert (checkpoint.name, checkpoint.max_positions, checkpoint.stop_ids) == ("mine", 128, (281,))
    model = load_model(checkpoint, torch.float32, "cpu")
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert sum(weight.numel() for weight in model.parameters()) == checkpoint.shape.total_parameters
    head = lm_head(checkpoint, torch.float32)
    ids = torch.arange(20)[None]
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(hidden @ head.T, model(ids).logits)
    tokenizer = load_tokenizer(checkpoint)
    assert family_stop_ids(tokenizer) == (282, 281)
    assert tokenizer.decode(tokenizer.encode("3+4=7")) == "3+4=7"


def test_the_head_alone_is_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(source(sharded))
    for file in set(checkpoint.weight_files.values()) - {checkpoint.weight_files["lm_head.weight"]}:
        file.unlink()
    head = lm_head(checkpoint, torch.bfloat16)
    assert (tuple(head.shape), head.dtype) == ((VOCAB_ROWS, 16), torch.bfloat16)


def test_the_revision_names_the_weights(tmp_path: Path) -> None:
    original = open_checkpoint(source(save(tmp_path / "a")))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert open_checkpoint(source(tmp_path / "copy")).revision == original.revision
    assert open_checkpoint(source(save(tmp_path / "other", seed=1))).revision != original.revision
    file = tmp_path / "copy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_checkpoint(source(tmp_path / "copy")).revision != original.revision


def test_a_remembered_hash_does_not_outlive_a_change(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_module, "_REMEMBER_FROM_BYTES", 1)
    monkeypatch.setattr(weights_module, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(weights_module, "say", lambda text: None)
    first = open_checkpoint(source(single)).revision
    notes = list((tmp_path / "cache" / "strong-to-weak" / "fingerprints").iterdir())
    assert len(notes) == 1
    notes[0].write_text("0" * 64)
    assert open_checkpoint(source(single)).revision != first, "the remembered hash is used"
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert open_checkpoint(source(single)).revision == first, "a rewritten file is hashed again"


def test_a_truncated_file_is_named_with_its_bytes(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    whole = file.stat().st_size
    for keep in (whole - 1, whole // 2):
        content = file.read_bytes()
        file.write_bytes(content[:keep])
        with pytest.raises(UserError, match=rf"{re.escape(str(file))} is cut off.* {keep} bytes .*should have {whole}"):
            open_checkpoint(source(sharded))
        file.write_bytes(content)


@pytest.mark.parametrize("keep", [0, 5, 8, 100])
def test_a_file_cut_off_in_its_header_is_named(single: Path, keep: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"model\.safetensors is cut off: it has {keep} bytes"):
        open_checkpoint(source(single))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(single: Path, place: int, value: int) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        tensors = validate_safetensors(single)
        assert len(tensors) > 1
    except UserError as error:
        assert "model.safetensors" in str(error)
    finally:
        file.write_bytes(content)


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def layers(num: int) -> Callable[[Path], None]:
    return edit_json("config.json", num_hidden_layers=num, layer_types=["full_attention"] * num)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def lengthen(folder: Path) -> None:
    with sorted(folder.glob("*.safetensors"))[0].open("ab") as stream:
        stream.write(b"\0")


def only_pickles(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def shift_data(folder: Path) -> None:
    """A tensor whose bytes are fewer than its shape needs, in a file of the right length."""
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_shard, r"model-00001-of-\d+\.safetensors is missing"),
        (swap_shards, r"does not hold the tensor .*which model\.safetensors\.index\.json says"),
        (lengthen, r"is too long: it has \d+ bytes and should have \d+"),
        (shift_data, r"is no safetensors file"),
        (only_pickles, r"pytorch_model\.bin, and pickled weights are never read"),
        (write("config.json", b"{"), r"config\.json cannot be read as JSON"),
        (write("config.json", b"[" * 100_000), r"config\.json cannot be read as JSON"),
        (write("config.json", b"[]"), r"config\.json holds a list"),
        (write("config.json", b'{"model_type": "qwen3"}'), r"config\.json .*'num_hidden_layers' is missing"),
        (edit_json("config.json", model_type="llama"), r"config\.json: .*type 'llama'.*qwen3.*another model"),
        (edit_json("config.json", hidden_size="16"), r"'16' for the model's width"),
        (
            edit_json("config.json", use_sliding_window=True, sliding_window=32),
            r"config\.json: use_sliding_window is True with a sliding_window of 32, .*copy with false if",
        ),
        (
            edit_json("config.json", layer_types=["full_attention", "sliding_attention"]),
            r"config\.json: layer_types has 'sliding_attention', .*another model",
        ),
        (
            edit_json("config.json", attention_dropout=0.1),
            r"config\.json: attention_dropout is 0\.1, .*copy of the model with 0",
        ),
        (
            edit_json("config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            r"config\.json: rope_parameters is of type 'dynamic', .*yarn",
        ),
        (
            edit_json("config.json", rope_scaling={"type": "longrope"}),
            r"config\.json: rope_scaling is of type 'longrope', .*yarn",
        ),
        (edit_json("config.json", max_position_embeddings=None), r"None for max_position_embeddings"),
        (edit_json("generation_config.json", eos_token_id="x"), r"'x' as eos_token_id"),
        (edit_json("model.safetensors.index.json", weight_map={}), r"no weight_map"),
        (
            edit_json("model.safetensors.index.json", weight_map={"lm_head.weight": "../x.safetensors"}),
            r"names '\.\./x\.safetensors' as a file",
        ),
    ],
)
def test_a_broken_folder_is_refused(sharded: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(sharded)
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(source(sharded))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},  # as Qwen3 is published
        {"use_sliding_window": True, "sliding_window": None},  # no layer of transformers' has a window then
    ],
)
def test_a_window_that_is_not_used_is_no_window(tmp_path: Path, given: dict[str, Any], moe: bool) -> None:
    folder = save(tmp_path / "model", moe=moe)
    changed = json.loads((folder / "config.json").read_text())
    del changed["sliding_window"]
    changed.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**changed, **given}))
    model = load_model(open_checkpoint(source(folder)), torch.float32, "cpu")
    assert model.config.sliding_window is None
    # Where the file says nothing of its size, the window has the one that transformers gives it.
    (folder / "config.json").write_text(json.dumps({**changed, "use_sliding_window": True}))
    with pytest.raises(UserError, match="use_sliding_window is True"):
        open_checkpoint(source(folder))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no model folder: there is no config\.json"):
        open_checkpoint(source(tmp_path))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (layers(3), r"lacks model\.layers\.2\.\S+, .* and \d+ more"),
        (layers(1), r"has no place for model\.layers\.1"),
        (edit_json("config.json", num_hidden_layers=1), r"config\.json is refused by transformers: .*layer_types"),
        (edit_json("config.json", intermediate_size=48), r"has in another shape .*mlp"),
    ],
)
def test_no_weight_is_left_at_random(single: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(single)
    with pytest.raises(UserError, match=sentence):
        load_model(open_checkpoint(source(single)), torch.float32, "cpu")


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, tied=True)
    edit_json("config.json", tie_word_embeddings=False)(folder)
    checkpoint = open_checkpoint(source(folder))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load_model(checkpoint, torch.float32, "cpu")
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        lm_head(checkpoint, torch.float32)


def test_a_missing_or_broken_tokenizer_is_refused(single: Path) -> None:
    (single / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(open_checkpoint(source(single)))
    (single / "tokenizer.json").unlink()
    (single / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(open_checkpoint(source(single)))


def test_generation_config_decides_the_stop_ids(single: Path) -> None:
    edit_json("generation_config.json", eos_token_id=[281, 282])(single)
    assert open_checkpoint(source(single)).stop_ids == (281, 282)
    (single / "generation_config.json").unlink()
    assert open_checkpoint(source(single)).stop_ids == (281,)


def test_a_hub_id_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Qwen/Qwen3-4B is not .*cache.* cannot be reached .*local folder.*HF_HOME"):
        open_checkpoint(ModelSource("4B", "hub", "Qwen/Qwen3-4B"))
    with pytest.raises(UserError, match=r"is no hub id"):
        open_checkpoint(ModelSource("x", "hub", "--bad--/na me"))


def test_a_cached_hub_model_opens_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    save(repository / "snapshots" / commit, shards=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_checkpoint(ModelSource("owner/name", "hub", "owner/name")).revision == commit
    remove_shard(repository / "snapshots" / commit)
    with pytest.raises(UserError, match=r"model-00001-of-\d+\.safetensors is missing"):
        open_checkpoint(ModelSource("owner/name", "hub", "owner/name"))
