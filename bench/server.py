"""A server as a process: started, waited for, watched, stopped with all its children.

Knows commands, ports and CPU seconds; knows no model and no workload.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from bench.forms import Form

START_SECONDS = 900  # a compiling server's first start
STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server to be measured and the form in which it takes its jobs."""

    name: str
    weights: str  # what its arithmetic reads: bf16, q4_1, …: figures compare within one class
    command: Sequence[str]  # "{port}" stands for the port, "{again}" for nothing or, beside itself, for another name
    form: Form
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[str], None] | None = None  # called with the URL once it serves
    uploads: str = ""  # where prompts are put, below the URL
    model_bytes: Callable[[str], float] | None = None  # of weights and KV in use, by the URL, where it tells them

    def command_line(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{name}={value}" for name, value in self.env.items()), *self.command])


@dataclass(frozen=True, slots=True)
class Running:
    """A contestant that serves at `url`."""

    url: str
    process: psutil.Process
    started_at: float  # on the monotonic clock
    start_seconds: float  # from exec to ready

    def cpu_seconds(self) -> float:
        """Burnt so far by the server and its living children."""
        total = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def anonymous_bytes(self) -> int:
        """Memory that is no file's, over all processes."""
        total = 0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10
        return total


@contextlib.contextmanager
def serving(contestant: Contestant, log: Path, *, again: bool = False) -> Iterator[Running]:
    """Start the contestant on a free port, wait for GET /health, stop it in the end. Its output goes to `log`.

    `again`: one of it is up already, and keeps what it writes on disk to itself.
    Raises RuntimeError with the end of the log if it dies or takes longer than START_SECONDS.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    suffix = "-again" if again else ""
    command = [part.replace("{port}", str(port)).replace("{again}", suffix) for part in contestant.command]
    started = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=os.environ | contestant.env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(child, url, contestant.name, log)
        running = Running(url, psutil.Process(child.pid), started, time.monotonic() - started)
        if contestant.prepare:
            contestant.prepare(url)
        yield running
    finally:
        _stop(child)


def _wait_until_healthy(child: subprocess.Popen[bytes], url: str, name: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    state = f"ended with {child.returncode}" if child.poll() is not None else f"not ready after {START_SECONDS} s"
    raise RuntimeError(f"{name}: {state}; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group to end, then make it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
