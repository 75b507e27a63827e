"""The machine under the servers: what it is, and how much of it others took while a run lasted.

Knows the operating system's counters; knows no server.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


def describe() -> dict[str, str | int]:
    """What a figure needs beside it to mean anything."""
    source = Path("/proc/cpuinfo")
    cpuinfo = source.read_text() if source.exists() else ""
    fields = dict(line.split("\t", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if "\t" in line)
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()).strip("\t: "),
        "cores": psutil.cpu_count() or 0,
        "vector_flags": " ".join(f for f in flags if f.startswith(("avx2", "avx512", "avx_vnni", "amx"))),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, slots=True)
class Reading:
    """The clock and the CPU seconds that the whole machine has burnt."""

    at: float
    busy: float

    @classmethod
    def now(cls) -> Reading:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice, too
        return cls(time.monotonic(), sum(times) - idle - guests)

    def busy_cores_since(self, earlier: Reading) -> float:
        """Cores that were busy, on average, between the two readings."""
        return (self.busy - earlier.busy) / (self.at - earlier.at)


def wait_until_quiet(seconds: float, idle_cores: float = 0.1, window: float = 2.0) -> bool:
    """Wait, at most so many seconds, for a window in which the machine is idle but for `idle_cores`. False: it never
    was. The server to be measured must be idle itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = Reading.now()
        time.sleep(window)
        if Reading.now().busy_cores_since(before) <= idle_cores:
            return True
    return False
