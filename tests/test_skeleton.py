"""The project as a whole: what the README says works, rooms import downwards, and nothing needs torch."""

from __future__ import annotations

import ast
import gc
import graphlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import headrace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(headrace.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(info.split(), body) for info, body in re.findall(r"^```([^\n]+)\n(.*?)^```$", README, re.S | re.M)]

# From the ground up; a room may import from itself and from those before it.
ROOMS = (
    "errors", "processes", "types", "trace", "results", "config", "formats", "text", "kernels", "parallel", "schedule",
    "quant", "memory", "sampling", "grammar", "speculate", "model", "plan", "workers", "engine", "completion",
    "frontend", "assemble", "assemble_split", "worker_process", "guest_process", "join_command",
    "build", "engine_process", "llm", "async_llm", "pipeline", "serve", "lab", "chat_cli", "cli",
    "__main__",
)  # fmt: skip

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def commands(kind: list[str]) -> list[str]:
    return [line for info, body in BLOCKS if info == kind for line in body.strip().splitlines()]


def parsed(path: Path) -> ast.Module:
    """A module's syntax tree. Python 3.11 fails (gh-106905) where what it parses is interrupted to collect garbage, and
    other threads parse meanwhile."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def imports(module: str, everywhere: bool) -> set[str]:
    """Modules of headrace that a module imports when it is loaded, or everywhere: in functions, and for types alone."""
    base = PACKAGE.parent / Path(*module.split("."))
    is_package = base.is_dir()
    path = base / "__init__.py" if is_package else base.with_suffix(".py")
    found: set[str] = set()
    tree = parsed(path)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".") if is_package else module.split(".")[:-1]
            parent = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            names = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            ]
        else:
            continue
        found.update(name for name in names if name.split(".")[0] == "headrace")
    return found - {module, "headrace"}


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_rooms_import_downwards():
    modules = [module for module in MODULES if module != "headrace"]
    below = {module: imports(module, everywhere=True) for module in modules}
    assert len(below) > 20 and any(below.values())
    upwards = [f"{module} imports {other}" for module in below for other in below[module] if room(other) > room(module)]
    assert not upwards
    loaded = {module: imports(module, everywhere=False) for module in modules}
    tuple(graphlib.TopologicalSorter(loaded).static_order())  # CycleError where modules import each other in a circle


def test_an_upward_import_would_be_seen(tmp_path, monkeypatch):
    (tmp_path / "headrace" / "text").mkdir(parents=True)
    (tmp_path / "headrace" / "text" / "low.py").write_text(
        "def f():\n    from ..llm import LLM\n    from .. import engine\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "headrace")
    assert imports("headrace.text.low", everywhere=True) == {"headrace.llm", "headrace.engine"}
    assert imports("headrace.text.low", everywhere=False) == set()
    assert room("headrace.llm") > room("headrace.text.low")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


BLOCK_TORCH = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_every_room_imports_without_torch():
    # The peers' scripts run in the environments of the engines that they measure.
    wanted = [module for module in MODULES if not module.endswith(("__main__", "_peer"))]
    done = python(f"{BLOCK_TORCH}\nimport importlib\nfor name in {wanted!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr
    assert "torch is blocked" in python(f"{BLOCK_TORCH}\nimport torch").stderr


def test_importing_headrace_imports_nothing_heavy():
    done = python("import headrace, sys; print([m for m in sys.modules if m in ('numpy', 'msgspec', 'typer', 'rich')])")
    assert done.stdout.strip() == "[]", done.stderr


def test_all_is_what_the_package_offers():
    public = {name for name in vars(headrace) if not name.startswith("_")} - {
        "annotations",
        "importlib",
        "TYPE_CHECKING",
        "Any",
    }
    modules = {module.split(".")[1] for module in MODULES if module.count(".") >= 1}
    assert public - modules <= set(headrace.__all__)
    assert set(headrace.__all__) == {*headrace._HOMES, "__version__"}
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    assert headrace.LLM.__name__ == "LLM" and headrace.SamplingParams.__name__ == "SamplingParams"
    with pytest.raises(AttributeError, match="no_such_name"):
        headrace.no_such_name  # noqa: B018
    assert set(dir(headrace)) == set(headrace.__all__)


def test_the_package_says_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", headrace.__version__)


# -- the README --------------------------------------------------------------------------------------------------------


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A README command in a shell, with `headrace` the one under test."""
    own = f"{shlex.quote(sys.executable)} -m headrace "
    line = re.sub(r"(^|\| )headrace ", lambda match: match[1] + own, command)
    shell = ["bash", "-euo", "pipefail", "-c", line]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(shell, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("command", commands(["bash"]))
def test_readme_command_runs(command, smollm2, tmp_path):
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", commands(["bash", "slow"]))
def test_slow_readme_command_runs(command, smollm2, tmp_path):
    assert run(command, tmp_path).returncode == 0


def test_readme_python_runs(smollm2):
    (code,) = (body for info, body in BLOCKS if info == ["python"])
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


OUTSIDE_QUOTES = r"""(?:&&|\|)(?=(?:[^"']|"[^"]*"|'[^']*')*$)"""


def test_every_command_in_the_readme_parses():
    """Also those that take long, or that talk: options that do not exist would be refused here."""
    from typer.main import get_command

    from headrace.cli import app

    lines = [*commands(["bash"]), *commands(["bash", "slow"]), *commands(["bash", "install"])]
    lines += [code.replace("\\|", "|") for code in re.findall(r"\| `([^`]*headrace[^`]*)` \|", README)]
    parts = [part.strip() for line in lines for part in re.split(OUTSIDE_QUOTES, line)]
    found = [shlex.split(part)[1:] for part in parts if part.startswith("headrace ")]
    assert len(found) >= 12
    for words in found:
        context = get_command(app).make_context("headrace", list(words))
        while rest := [*context._protected_args, *context.args]:
            _, command, rest = context.command.resolve_command(context, rest)  # type: ignore[attr-defined]
            context = command.make_context(command.name, rest, parent=context)


def test_the_install_lines_are_the_project_s():
    first, second = commands(["bash", "install"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert first.startswith("pip install . && headrace run ")
    assert second == "pip install '.[test]' && pytest -n 2"
    assert "test" in project["optional-dependencies"]
    assert project["scripts"] == {"headrace": "headrace.cli:main"}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert second in ci and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_readme_s_map_names_every_room():
    table = README[README.index("## The code") :]
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", table))
    rooms = {module.split(".")[1] for module in MODULES if module.count(".") >= 1} - {"__main__"}
    assert rooms <= named and named - rooms <= {
        *("csrc", "ops", "reference", "spec", "runner", "hub", "group", "shares", "staged", "worker")
    }
