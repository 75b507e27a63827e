"""What the README and the docs show is executed, against the server that `make serve` starts."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.process import ROOT

pytestmark = pytest.mark.slow
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, embedded) -> Path:
    """A folder that looks like the checkout to what is run in it."""
    for name in ("models", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("number", range(2))
def test_python_of_the_readme(default, here, number):
    code = blocks("README.md", "python")[number].replace(ADDRESS, default.url)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()
    assert len(said) >= 2
    assert "sha256:" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/http.md"])
def test_shell_lines(default, here, page):
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert lines
    for line in lines:
        if line.startswith("curl ") and not shutil.which("curl"):
            continue
        done = subprocess.run(
            shlex.split(line.replace(ADDRESS, default.url)),
            cwd=here,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)
        assert '"error"' not in done.stdout, (line, done.stdout)
