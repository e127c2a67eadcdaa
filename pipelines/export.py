"""``distill export``: a finished run's student as a folder that others can load, with a card that says what it is.

What was trained whole is exported whole. What was trained as adapters is exported as adapters for its base, or merged
into it (``merge_lora``). Left out on purpose: other formats (GGUF, quantised weights), which are made from this one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distill.config import RunConfig
from distill.errors import DistillError, UserError
from distill.family import ModelSource
from distill.journal import StoredTensors, read_json, write_folder
from distill.recipe import load_recipe, validate
from pipelines.model_card import model_card, source_of

Form = Literal["full", "merged", "adapter"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_WEIGHTS = "weights/"
_LAYER = "base_model.model."
"""What peft writes before a layer's name in an adapter's file."""


def export_run(run: Path, to: Path, *, merge_lora: bool = False, hub_name: str | None = None) -> dict[str, Any]:
    """Write the student of the run directory ``run`` to the new folder ``to``; what was written, as JSON can hold it.

    ``hub_name`` is what it will be called on the hub, if it is to go there. Raises UserError for a run that is not
    finished, adapters to merge where there are none, adapters that nobody else could use, and a folder in use.
    """
    config = _finished(run)
    if merge_lora and config.student.lora is None:
        raise UserError(f"{run} trained every weight of its student: there are no adapters; leave --merge-lora out")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to} is in use; name a new or an empty folder")
    form: Form = "full" if config.student.lora is None else "merged" if merge_lora else "adapter"
    base = source_of(config.student.model, role="student")
    if form == "adapter" and hub_name is not None and base.kind != "hub":
        raise UserError(
            f"{run} holds adapters for {config.student.model}, which is not on the hub: there they would be of no use; "
            "send the merged student with --merge-lora"
        )

    def write(folder: Path) -> None:
        if form == "adapter":
            _write_adapter(run, folder, config, base)
        else:
            shutil.copytree(run / "student", folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(
            model_card(run, config, form=form, name=hub_name or to.name), encoding="utf-8"
        )

    write_folder(to, write)
    return {"run": str(run), "to": str(to), "form": form, "files": sorted(path.name for path in to.iterdir())}


def _finished(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory (it has no config.yaml); give the folder that distill run wrote")
    if not ((run / "summary.json").is_file() and (run / "student").is_dir()):
        raise UserError(
            f"{run} is not finished; give its command again, which resumes it. Each folder below {run / 'checkpoints'} "
            f"is a model that transformers and vLLM load as it is"
        )
    return validate(load_recipe(run / "config.yaml"), where=str(run / "config.yaml"))


def _write_adapter(run: Path, folder: Path, config: RunConfig, base: ModelSource) -> None:
    """The adapters of the last checkpoint in peft's form, and everything of the student that is not weights."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors = {_adapter_name(name): tensor for name, tensor in _trained(run).items()}
    settings = config.student.lora
    assert settings is not None
    # By their names, as vLLM wants them; a mixture's experts are stacked, and peft alone knows their names.
    stacked = any(".experts." in name for name in tensors)
    names = settings.target_modules
    modules = names if stacked else sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})
    for file in (run / "student").iterdir():
        if not file.name.startswith("model") and file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder / file.name)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.location,
        revision=read_json(run / "manifest.json")["student"]["revision"] if base.kind == "hub" else None,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _trained(run: Path) -> Mapping[str, Any]:
    """The trained tensors of the run's last checkpoint."""
    steps = (run / "checkpoints").glob("step_*/training.safetensors")
    files = sorted(steps, key=lambda file: int(file.parent.name.removeprefix("step_")))
    if not files:
        raise UserError(
            f"{run / 'checkpoints'} is gone, and the adapters with it; export the merged student with --merge-lora"
        )
    return dict(StoredTensors(files[-1], _WEIGHTS))


def _adapter_name(name: str) -> str:
    """peft's name, in a file, of an adapter's tensor that is called ``name`` in the model."""
    return _LAYER + re.sub(r"(\.lora_(?:embedding_)?[AB])\.default(?=\.|$)", r"\1", name)


def check_hub_name(name: str) -> None:
    """Raises UserError for what is no OWNER/NAME, and where the hub is not to be asked."""
    from huggingface_hub import constants

    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"--push-to-hub {name!r} is no name of a repository; write OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set; unset it, or leave the option out")


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload ``folder`` as the model ``name`` (OWNER/NAME); its address. A repository that is made is private.

    Raises UserError where the hub refuses, DistillError where the upload breaks off; the folder stays in either case.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    again = f"the export is whole in {folder}: `hf upload {name} {folder}` sends it"
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by distill")
    except errors.HFValidationError as error:
        raise UserError(f"--push-to-hub {name!r} is no name of a repository ({error}); {again}") from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"the hub wants to know who you are: `hf auth login`, or set HF_TOKEN; {again}") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise UserError(
                f"the hub does not let you write to {name} ({error.response.status_code}): check the owner's name and "
                f"the token's rights (`hf auth whoami`); {again}"
            ) from None
        raise DistillError(f"the hub refused the upload ({error.response.status_code}); {again}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise DistillError(f"the upload broke off ({str(error) or type(error).__name__}); {again}") from error
    return str(url)
