"""A run folder: what was asked, with what it was run, how it went, and where it stands.

    config.json         what was asked, with its digest and the seed; never changes
    versions.json       what it was first run with
    command.txt         the command line that first asked
    log.jsonl           one line an event; after a resume it goes on from the state, not from where it broke off
    state.safetensors   where the run stands: tensors, and everything else as JSON in the metadata
    figures.json        what came out

Every file but the log is replaced as a whole, so a process may be killed at any moment and started again. One process
at a time holds a folder. Knows no model and nothing of what a run does.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lab.disk import saving, write_bytes, write_file, write_json
from lab.errors import RunError

CONFIG, VERSIONS, COMMAND = "config.json", "versions.json", "command.txt"
LOG, STATE, FIGURES = "log.jsonl", "state.safetensors", "figures.json"


@dataclass(frozen=True)
class State:
    """Where a run stands: tensors by name, and JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Run:
    """An open run folder; close it, or use it in `with`. Made by `open_run`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], seed: int, lock: FileLock) -> None:
        self.folder, self.config, self.seed = folder, config, seed
        self._lock = lock
        with saving(folder / LOG):
            self._log = (folder / LOG).open("a+b")
            self._cut(_whole_lines(folder / LOG))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        try:
            with suppress(OSError):  # a line that a full disk has refused, which was told then
                self._log.close()
        finally:
            self._lock.release()

    def log(self, event: str, **fields: Any) -> None:
        """Add a line with the time (UTC). Raises RunError."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
        with saving(self.folder / LOG):
            self._log.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._log.flush()

    def save(self, state: State) -> None:
        """Replace the state. Raises RunError; the state before it is then still there."""
        with saving(self.folder / STATE):
            os.fsync(self._log.fileno())
            values = {"values": state.values, "log_bytes": self._log.seek(0, os.SEEK_END)}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            write_file(self.folder / STATE, lambda part: save_file(tensors, part, {"state": json.dumps(values)}))

    def load(self) -> State | None:
        """The last state that was saved, or None. The log is cut back to what it was then. Raises RunError."""
        file = self.folder / STATE
        if not file.exists():
            self._cut(0)
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
                saved = json.loads((stored.metadata() or {})["state"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise RunError(f"{file} is damaged ({error}); remove it to start the run again") from error
        self._cut(saved["log_bytes"])
        return State(tensors, saved["values"])

    def tell(self, **figures: Any) -> None:
        """Put these among the figures; those already there stay. Raises RunError."""
        self.log("figures", names=sorted(figures))
        write_json(self.folder / FIGURES, {**self.figures, **figures})

    @property
    def figures(self) -> Mapping[str, Any]:
        """What has come out so far."""
        file = self.folder / FIGURES
        return _read_json(file) if file.exists() else {}

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The lines of the log, or those of one event."""
        lines = [json.loads(line) for line in (self.folder / LOG).read_bytes().splitlines()]
        return [line for line in lines if name in (None, line["event"])]

    def _cut(self, size: int) -> None:
        with saving(self.folder / LOG):
            self._log.truncate(min(size, self._log.seek(0, os.SEEK_END)))
            self._log.seek(0, os.SEEK_END)


def open_run(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Run:
    """Start a run in `folder`, or take up the one that is there.

    `config` is JSON and says all that the outcome depends on; the seed stands beside it. Raises RunError where another
    process holds the folder, where it is the run of another config (naming the fields that differ) or no run at all.
    """
    asked = {"config": json.loads(json.dumps(dict(config))), "seed": seed}
    record = {"digest": config_digest(asked), **asked}
    with saving(folder):
        if folder.is_dir() and not (folder / CONFIG).exists() and any(_strangers(folder)):
            raise RunError(f"{folder} is not empty and holds no run; choose another folder (--run)")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    try:
        if (folder / CONFIG).exists():
            _check_same(folder, _read_json(folder / CONFIG), record)
            now, then = versions(), _read_json(folder / VERSIONS) if (folder / VERSIONS).exists() else {}
        else:
            now = then = versions()
        if not (folder / VERSIONS).exists():
            write_json(folder / VERSIONS, now)
        write_json(folder / CONFIG, record)
        if not (folder / COMMAND).exists():
            write_bytes(folder / COMMAND, f"{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n".encode())
        run = Run(folder, record["config"], seed, lock)
    except BaseException:
        lock.release()
        raise
    if changed := {name: [then.get(name), now[name]] for name in now if then.get(name, now[name]) != now[name]}:
        run.log("versions_changed", changed=changed)  # bits may differ from an unbroken run's
    return run


def config_digest(config: Mapping[str, Any]) -> str:
    """`sha256:<hex>` of its JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def versions() -> dict[str, Any]:
    """What decides about bits, on top of the config: software, threads, the processor."""
    return {
        "promptstitch": version("promptstitch"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(f"another process is running in {folder}; wait for it, or choose another --run") from error
    return lock


def _strangers(folder: Path) -> Iterator[Path]:
    """Files that a start which was killed at once does not leave."""
    ours = {".lock", *(f".{name}.part" for name in (CONFIG, VERSIONS)), VERSIONS}
    return (file for file in folder.iterdir() if file.name not in ours)


def _check_same(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    before = _flat({"seed": stored.get("seed"), **stored.get("config", {})})
    now = _flat({"seed": asked["seed"], **asked["config"]})
    fields = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if fields:
        told = "; ".join(f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}" for name in fields[:5])
        raise RunError(f"{folder} holds a run of another config: {told}. Ask for the same, or choose another --run")


def _flat(value: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{at}{name}.") if isinstance(item, Mapping) and item else {f"{at}{name}": item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); choose another --run") from error
    return value


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
