"""What every test runs under: set before anything imports torch or transformers, and inherited by child processes."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# One thread: pinned numbers do not depend on how many cores a machine has, and tensors this small need no more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where there is no GPU, Triton's kernels run in its interpreter; Triton asks once, when it is imported.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What only a GPU can show is a file of its own, and no skipped test elsewhere.
collect_ignore = [] if Path("/proc/driver/nvidia/version").exists() else ["test_gpu.py"]
# On a CPU this one repeats others, for minutes; asked for by name it shows that it works.
if collect_ignore and not any("test_sampler_device" in word for word in sys.argv):
    collect_ignore.append("test_sampler_device.py")
# A test that would reach for a hub fails at once and the same way everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A plain `pytest` says which tests it left out, and why, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("server"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: ./do setup-server"))


@pytest.fixture(scope="session", autouse=True)
def store_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Teacher responses go to a temporary folder: no test reads or writes the user's own store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; exit code, standard output, standard error, as the system saw them."""
    from distill import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run
