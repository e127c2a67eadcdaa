"""float32 is float32 on a GPU as well: what Triton, whose attention vLLM takes there, is told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.checkpoint import open_checkpoint
from distill.family import resolve
from distill.vllm.launch import ROLES, Launch

ON_GPU = Launch(open_checkpoint(resolve("nano", role="student")), "generate", "float32", 64, on_gpu=True)


def test_it_is_told_of_float32_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    for role in ROLES:
        assert replace(ON_GPU, role=role).environment()["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in replace(ON_GPU, dtype="bfloat16").environment()
    assert "TRITON_F32_DEFAULT" not in replace(ON_GPU, on_gpu=False).environment()
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")  # the user's own
    assert ON_GPU.environment()["TRITON_F32_DEFAULT"] == "tf32"


KERNEL = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(a, b, c):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place)))

source = ASTSource(fn=product, signature={name: "*fp32" for name in "abc"}, constexprs={})
print("tf32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_product_of_triton_s_is_tf32_unless_it_is_told(tmp_path: Path) -> None:
    """As vLLM's kernel has it, ``tl.dot`` and no word of precision. Compiling wants no GPU."""
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    others = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}

    def is_tf32(told: dict[str, str]) -> str:
        # The same cache: Triton makes a kernel anew where it is told something else.
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**others, "TRITON_CACHE_DIR": str(tmp_path / "cache"), **told},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert is_tf32({}) == "True"
    assert is_tf32(ON_GPU.precision()) == "False"
