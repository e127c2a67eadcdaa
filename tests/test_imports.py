"""The import arrow: distill <- {teachers, students, eval} <- pipelines <- distill/cli/.

Imports are read from the source, so one inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("distill", "teachers", "students", "pipelines", "eval")
# Never in a package: code that only a checkout has.
CHECKOUT_ONLY = {"benchmarks", "tests"}
MAY_IMPORT = {
    "distill": set[str](),
    "teachers": {"distill"},
    "students": {"distill"},
    "eval": {"distill"},
    "pipelines": {"distill", "teachers", "students", "eval"},
}
# The command line stands on the ground floor and opens onto the top one.
DOOR = ROOT / "distill" / "cli"
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PYTHON_FILES = SOURCES + sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
LIGHT_MODULES = (
    "distill",
    "distill.types",
    "distill.config",
    "distill.settings",
    "distill.family",
    "distill.chat",
    "distill.errors",
    "distill.clusters",
    "distill.jobs",
)
HEAVY_MODULES = ("torch", "transformers", "vllm", "datasets", "pandas", "pyarrow")


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each absolute import; a relative one cannot leave its own package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def forbidden_imports(package: str, source: str) -> list[str]:
    """'line: name' of each import in `source`, a module of `package`, that points up or sideways."""
    allowed = MAY_IMPORT[package] | {package}
    ours = (set(PACKAGES) | CHECKOUT_ONLY) - allowed
    return [f"{line}: {name}" for line, name in imported_modules(source) if name.split(".")[0] in ours]


def names_bound_to_eval(source: str) -> list[int]:
    """Lines of the imports that bind the name `eval`, and so hide the builtin from the rest of their scope."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (alias.asname or (alias.name.split(".")[0] if isinstance(node, ast.Import) else alias.name)) == "eval"
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path: Path) -> None:
    floor = "pipelines" if DOOR in path.parents else path.relative_to(ROOT).parts[0]
    found = forbidden_imports(floor, path.read_text())
    assert not found, f"{path.relative_to(ROOT)}: {floor} may import only {sorted(MAY_IMPORT[floor])}, got {found}"


def test_the_arrow_test_sees_imports_wherever_they_stand() -> None:
    source = "def f():\n    from teachers.x import X\nif TYPE_CHECKING:\n    import pipelines.loop\nimport distill"
    assert forbidden_imports("students", source) == ["2: teachers.x", "4: pipelines.loop"]
    assert forbidden_imports("pipelines", source) == []
    assert forbidden_imports("distill", "import torch\nfrom . import types\nfrom evaluate import load") == []
    assert forbidden_imports("eval", "import benchmarks.peers") == ["1: benchmarks.peers"]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_hides_the_builtin_eval(path: Path) -> None:
    assert names_bound_to_eval(path.read_text()) == []


def test_hidden_builtins_are_found() -> None:
    assert names_bound_to_eval("import eval\nimport eval.tasks\nfrom x import eval\nimport x as eval") == [1, 2, 3, 4]
    assert names_bound_to_eval("from eval.tasks import chain\nimport eval.tasks as tasks\neval('1')") == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_ascii(path: Path) -> None:
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    assert [number for number, line in lines if not line.isascii()] == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_nouns_and_configuration_import_nothing_heavy(module: str) -> None:
    """`distill --help` and `distill plan` answer at once only as long as this holds."""
    code = f"import sys, {module}\nprint(*(name for name in {HEAVY_MODULES!r} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
