"""An exported student is what the run trained: transformers, peft and vLLM load it; its card says how it was made."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.checkpoint import open_checkpoint
from distill.embedded import checkpoint_dir
from distill.errors import UserError
from distill.family import ModelSource, resolve
from distill.recipe import load_recipe, validate
from distill.vllm.launch import Launch
from distill.vllm.service import Service
from pipelines.export import export_run
from pipelines.model_card import model_card, without_places
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "stages.off_policy.num_prompts=16",
    "stages.off_policy.batch_size=8",
    "stages.on_policy.steps=2",
    "stages.on_policy.prompts_per_step=4",
    "evaluation.num_questions=4",
)
FAST = ("stages.off_policy.optimiser={learning_rate: 0.05, warmup_steps: 0}",)
"""So that two steps move the weights far enough to be told from where they were."""


def finished(out: Path, *assignments: str) -> Path:
    config = resolve_run(assignments=[*SMALL, *FAST, f"store={out.parent}/store", *assignments])
    run(config, out, command=["distill", "run", "--out", "a place"])
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("adapted") / "run", "student.lora={rank: 4, alpha: 8.0}")


IDS = torch.arange(60)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_whole_student_is_exported_as_it_is(whole: Path, tmp_path: Path) -> None:
    document = export_run(whole, tmp_path / "to" / "nano")
    assert document["form"] == "full" and {"README.md", "model.safetensors", "tokenizer.json"} <= set(document["files"])
    assert torch.equal(logits(load(tmp_path / "to" / "nano")), logits(load(whole / "student")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to" / "nano")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4="}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text.endswith("<think>\n\n</think>\n\n")
    assert not list((tmp_path / "to").glob(".*"))


def test_adapters_of_a_mixtures_experts_on_their_base_are_the_student(tmp_path: Path) -> None:
    trained = finished(tmp_path / "run", "student.model=nano-moe", "student.lora={rank: 2, alpha: 4.0}")
    export_run(trained, tmp_path / "adapter")
    base = load(checkpoint_dir("nano-moe"))
    before, student = logits(base), logits(load(trained / "student"))
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert (student - before).abs().max() > 0.1
    torch.testing.assert_close(found, student, atol=1e-4, rtol=0)


def test_adapters_on_their_base_are_the_student(adapted: Path, tmp_path: Path) -> None:
    document = export_run(adapted, tmp_path / "adapter")
    assert document["form"] == "adapter" and "model.safetensors" not in document["files"]
    base = load(checkpoint_dir("nano"))
    before = logits(base)
    student = logits(load(adapted / "student"))
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert (student - before).abs().max() > 0.1
    torch.testing.assert_close(found, student, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    assert export_run(adapted, tmp_path / "merged", merge_lora=True)["form"] == "merged"
    assert torch.equal(logits(load(tmp_path / "merged")), student)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded student with a head of its own."""
    folder = tmp_path_factory.mktemp("base") / "untied"
    shutil.copytree(checkpoint_dir("nano"), folder)
    model = load(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["[embed_tokens]", "[model.embed_tokens, q_proj, down_proj]"])
def test_adapters_of_an_embedding_beside_a_head_of_its_own(targets: str, untied: Path, tmp_path: Path) -> None:
    lora = f"student.lora={{rank: 4, alpha: 8.0, target_modules: {targets}}}"
    trained = finished(tmp_path / "run", f"student.model={untied}", lora)
    export_run(trained, tmp_path / "adapter")
    base, student = load(untied), load(trained / "student")
    before, head = logits(base), base.lm_head.weight
    assert torch.equal(student.lm_head.weight, head)
    assert not torch.equal(student.get_input_embeddings().weight, base.get_input_embeddings().weight)
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert (logits(student) - before).abs().max() > 0.1
    torch.testing.assert_close(found, logits(student), atol=1e-4, rtol=0)
    export_run(trained, tmp_path / "merged", merge_lora=True)
    assert torch.equal(logits(load(tmp_path / "merged")), logits(student))


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ("target_modules: [q_proj, lm_head]", "has lm_head, the student's head"),
        ("target_modules: [embed_tokens, lm_head]", "has lm_head, the student's head"),
        ("modules_to_save: [lm_head]", r"unknown key student\.lora\.modules_to_save"),
    ],
)
def test_adapters_of_a_head_are_refused_before_a_run(lora: str, sentence: str, untied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        finished(tmp_path / "run", f"student.model={untied}", f"student.lora={{rank: 4, {lora}}}")


def test_the_card_says_what_the_run_says(adapted: Path, tmp_path: Path) -> None:
    export_run(adapted, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    summary = json.loads((adapted / "summary.json").read_text())
    last = {entry["mode"]: entry for entry in summary["scores"] if entry["checkpoint"] == "on_policy"}
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results is not None
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        ("embedded", "avg@1", last[mode]["mean"]) for mode in ("think", "no_think")
    ]
    for entry in summary["scores"]:
        low, high = entry["ci95"]
        assert f"{100 * entry['mean']:.1f} % ({100 * low:.1f} - {100 * high:.1f})" in card.text
    steps = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    assert f"{sum(step['think.reverse_kl'] for step in steps[-2:]) / 2:.4f}" in card.text
    for role, cost in summary["costs"].items():
        assert f"| {role.replace('_', ' ')} | {cost['tokens']:,} | {cost['flops']:.1e} |" in card.text
    assert "distill run --out 'a place'" in card.text
    assert "LoRA adapters (rank 4)" in card.text and "the embedded model tiny" in card.text


def test_the_card_of_a_real_pair(whole: Path) -> None:
    """What the hub reads of a base, data sets and a licence; no path of this machine."""
    own = validate(load_recipe(whole / "config.yaml"), where="the run")
    real = resolve_run(recipe="qwen3-235b-to-4b", assignments=["specialists.maths={model: 32B, backend: vllm}"])
    config = own.model_copy(
        update={
            "teacher": real.teacher,
            "student": real.student,
            "prompts": real.prompts,
            "specialists": real.specialists,
        }
    )
    card = ModelCard(model_card(whole, config, form="full", name="owner/name"))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-4B-Base", "finetune")
    assert data["license"] == "apache-2.0" and "AI-MO/NuminaMath-CoT" in data["datasets"]
    assert "Qwen/Qwen3-235B-A22B" in card.text and "| teacher for maths | Qwen/Qwen3-32B |" in card.text
    assert "licence Apache-2.0" in card.text and 'from_pretrained("owner/name"' in card.text
    local = config.student.model_copy(update={"model": "/home/me/secret-project/base-model"})
    text = model_card(whole, config.model_copy(update={"student": local}), form="full", name="name")
    assert "a local model (base-model)" in text.lower() and "secret-project" not in text


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("distill run --out runs/mine --seed 1", "distill run --out runs/mine --seed 1"),
        ("distill run --recipe /home/me/secret/my.yaml --out ../secret/a", "distill run --recipe my.yaml --out a"),
        ("distill run --store '~/secret/store' --teacher 32B", "distill run --store 'store' --teacher 32B"),
        ("distill run --teacher-url http://internal:8000 --seed 2", "distill run --teacher-url ... --seed 2"),
        (
            "distill run --set 'teacher.urls.score=[http://a:1,http://b:2]'",
            "distill run --set 'teacher.urls.score=[...,...]'",
        ),
        ("distill run --set prompts.path=/data/secret/p.jsonl", "distill run --set prompts.path=p.jsonl"),
        (
            "distill run --prompts OWNER/SET@abc --teacher Qwen/Qwen3-4B",
            "distill run --prompts OWNER/SET@abc --teacher Qwen/Qwen3-4B",
        ),
    ],
)
def test_a_cards_command_names_no_place(command: str, public: str) -> None:
    assert without_places(command) == public


def test_what_cannot_be_exported_is_said(whole: Path, adapted: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("years of work")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("seed: 0\n")
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (tmp_path, tmp_path / "to", {}, "is no run directory"),
        (unfinished, tmp_path / "to", {}, "is not finished"),
        (whole, tmp_path / "used", {}, "in use"),
        (whole, tmp_path / "used" / "file", {}, "in use"),
        (whole, tmp_path / "to", {"merge_lora": True}, "no adapters"),
        (adapted, tmp_path / "to", {"hub_name": "owner/name"}, "--merge-lora"),
    ]
    for source, to, options, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            export_run(source, to, **options)
    assert not (tmp_path / "to").exists()
    assert (tmp_path / "used" / "file").read_text() == "years of work"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks: every file is taken into the commit itself."""

    received: dict[str, bytes]
    asked: list[tuple[str, Any]]
    status: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._say(
                {
                    "commitUrl": f"http://{self.headers['Host']}/owner/name/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                }
            )
        document = json.loads(body)
        self.asked.append((self.path, document))
        if self.path == "/api/repos/create":
            return self._say({"url": f"http://{self.headers['Host']}/owner/{document['name']}"}, self.status)
        if "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in document["files"]
            ]
            return self._say({"files": modes})
        return self._say({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._say({"id": "owner/name", "sha": "0" * 40, "siblings": []}, self.status)

    def _say(self, document: Any, status: int = 200) -> None:
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def a_hub(status: int = 200) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"received": {}, "asked": [], "status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def typed(endpoint: str, *arguments: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_TOKEN": "hf_x"}
    command = [sys.executable, "-m", "distill.cli", "export", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_an_upload_sends_the_whole_folder_to_a_private_repository(whole: Path, tmp_path: Path) -> None:
    with a_hub() as (endpoint, hub):
        done = typed(endpoint, str(whole), "--to", str(tmp_path / "to"), "--push-to-hub", "owner/name", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"run", "to", "form", "files", "url"}
    assert document["url"].endswith("owner/name")
    assert hub.received.keys() == set(document["files"])
    assert all(content == (tmp_path / "to" / name).read_bytes() for name, content in hub.received.items())
    created = next(body for path, body in hub.asked if path == "/api/repos/create")
    assert created["name"] == "name" and (created.get("private") is True or created.get("visibility") == "private")
    assert "owner/name" in (tmp_path / "to" / "README.md").read_text()


def test_what_the_hub_refuses_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    with a_hub(403) as (endpoint, _):
        done = typed(endpoint, str(whole), "--to", str(tmp_path / "to"), "--push-to-hub", "owner/name")
    assert done.returncode == 2 and "hf upload owner/name" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "to" / "README.md").exists()
    for name, offline, sentence in (
        ("name", "0", "write OWNER/NAME"),
        ("owner/na me", "0", "no name of a repository"),
        ("owner/name", "1", "HF_HUB_OFFLINE is set"),
    ):
        done = typed(endpoint, str(whole), "--to", str(tmp_path / "new"), "--push-to-hub", name, offline=offline)
        assert (done.returncode, done.stdout) == (2, "") and sentence in done.stderr and "Traceback" not in done.stderr
    done = typed(endpoint, str(whole), "--to", str(tmp_path / "new"), "--public")
    assert done.returncode == 2 and "--push-to-hub" in done.stderr
    assert not (tmp_path / "new").exists()


def generated(service: Service, model: str, ids: list[int]) -> list[int]:
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    return list(answer.json()["choices"][0]["token_ids"])


def greedy(folder: Path, ids: list[int]) -> list[int]:
    model = load(folder)
    said = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    return [int(token) for token in said[0, len(ids) :]]


@pytest.mark.server
def test_vllm_serves_what_was_exported(whole: Path, adapted: Path, tmp_path: Path) -> None:
    """The student as the model itself, and adapters on their base, say what transformers says."""
    export_run(whole, tmp_path / "whole")
    export_run(adapted, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4*2="}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text)
    student = open_checkpoint(ModelSource("student", "directory", str(tmp_path / "whole")))
    launch = Launch(student, "generate", dtype="float32", max_model_len=256, on_gpu=False)
    with Service(launch, log=tmp_path / "whole.log") as service:
        service.wait()
        assert generated(service, "student", ids) == greedy(whole / "student", ids)
    base = open_checkpoint(resolve("nano", role="student"))
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={tmp_path / 'adapter'}")
    launch = Launch(base, "generate", dtype="float32", max_model_len=256, on_gpu=False, extra=lora)
    with Service(launch, log=tmp_path / "adapter.log") as service:
        service.wait()
        assert generated(service, "adapter", ids) == greedy(adapted / "student", ids)
        assert generated(service, "nano", ids) == greedy(checkpoint_dir("nano"), ids)
