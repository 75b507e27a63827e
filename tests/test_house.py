"""The rules of the house that no other tool holds: sizes, names, what is never called, versions that agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "engine", "llama", "prompts_store", "lab", "bench", "cli")
MAX_MODULE, MAX_FUNCTION = 350, 60  # lines
# Calls that run or unpickle what they are given. `torch.load` is one even with weights_only, which one command may do.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "pickle.load"}
ALLOWED = {"cli/paper.py": ["torch.load of weights only"]}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Python files under these folders, as they are named from the root."""
    found = [file.relative_to(ROOT) for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


OURS = sources(*PACKAGES)
ALL = sources(*PACKAGES, "tests", "scripts")


def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@pytest.mark.parametrize("file", ALL, ids=str)
def test_modules_and_functions_stay_small(file):
    assert len((ROOT / file).read_text().splitlines()) <= MAX_MODULE
    functions = [node for node in ast.walk(parsed(file)) if isinstance(node, Function)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION}
    assert not long


@pytest.mark.parametrize("file", OURS, ids=str)
def test_modules_open_with_what_they_are(file):
    assert ast.get_docstring(parsed(file))


def suspicious(tree: ast.Module) -> Iterator[str]:
    """What could run or unpickle something from outside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            tensors_alone = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"{name} of weights only" if tensors_alone else name
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell") and ast.unparse(keyword.value) != "False":
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("file", OURS, ids=str)
def test_nothing_from_outside_is_run_or_unpickled(file):
    assert list(suspicious(parsed(file))) == ALLOWED.get(str(file), [])


def test_the_search_for_such_calls_finds_them():
    imports, calls = (
        "import pickle.x\nfrom dill import y\n",
        "torch.load(f)\neval(s)\ntorch.load(f, weights_only=True)\n",
    )
    bad = f"{imports}{calls}f(trust_remote_code=True)\nrun(shell=x)\nf(shell=False)"
    assert list(suspicious(ast.parse(bad))) == [
        "pickle.x",
        "dill",
        "torch.load",
        "eval",
        "torch.load of weights only",
        "trust_remote_code=True",
        "shell=x",
    ]


def test_no_dependency_ships_a_module_of_one_of_our_names():
    """Plain top-level names are safe only where nobody else takes them."""
    owners = packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, [])) <= {"promptstitch"}
    shipped = {
        path.parts[0].removesuffix(".py")
        for distribution in distributions()
        if distribution.metadata["Name"] != "promptstitch"
        for path in distribution.files or ()
        if path.suffix == ".py"
    }
    assert not shipped & set(PACKAGES)
    assert "torch" in shipped


def test_changelog_and_pyproject_agree_on_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version


def test_locks_hold_hashes_and_neither_torch_nor_an_address():
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        pins = re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)
        assert len(pins) > 40
        assert not {pin for pin in pins if pin in ("torch", "triton") or pin.startswith("nvidia-")}
        assert "://" not in text
        assert not re.search(r"^-", text, re.MULTILINE)
        assert len(re.findall(r"^[a-z0-9-]+==.*\n    --hash=sha256:", text, re.MULTILINE)) == len(pins)


def test_both_locks_name_the_same_releases():
    pins = [
        set(re.findall(r"^([a-z0-9-]+==[^\s]+)", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    ]
    assert pins[0] <= pins[1]


def test_every_dependency_of_pyproject_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, wanted in (
        ("requirements.lock", project["dependencies"]),
        ("requirements-dev.lock", [*project["dependencies"], *project["optional-dependencies"]["dev"]]),
    ):
        pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / name).read_text(), re.MULTILINE))
        names = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in wanted}
        assert names - pinned == {"torch"}


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)]
)
def test_the_checkers_have_nothing_to_say(command):
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_gets_what_it_copies():
    """`COPY lab lab` failed: .dockerignore let nothing of lab through."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == let_through
    assert set(PACKAGES) <= sources
