"""The command as a user runs it: `promptstitch serve` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


class Process:
    """A server in a process, and a client for it."""

    def __init__(self, *arguments: object, log: Path) -> None:
        self._log = log
        self._file = log.open("w")
        command = [str(BIN / "promptstitch"), "serve", *map(str, arguments), "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMPTSTITCH_")}
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._file, stderr=subprocess.STDOUT, env=environment)
        self.url = self._ready()
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _ready(self) -> str:
        for _ in range(1200):
            if found := re.search(r"^ready +(\S+)", self._log.read_text(), re.MULTILINE):
                return found[1]
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"no server after two minutes:\n{self._log.read_text()}")

    def output(self) -> str:
        return self._log.read_text()

    def stop(self, how: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(how)
        code = self.process.wait(60)
        self.client.close()
        self._file.close()
        return code


@contextmanager
def running(*arguments: object, log: Path) -> Iterator[Process]:
    server = Process(*arguments, log=log)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
