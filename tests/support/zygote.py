"""`promptstitch serve` by fork from a process that has imported everything: a restart takes one second, not eight.

Reads lines of JSON from stdin: [log, argument, …]. For each a child runs the command, its output in the log; printed
are its pid and, once it has ended, how. One server at a time, and no threads of its own: a fork would lose them.
"""

import json
import os
import sys
import threading

import cli.local
import cli.model
import cli.serve
import server.run
from cli.main import main

IMPORTED = (cli.local, cli.model, cli.serve, server.run)


def child(log: str, arguments: list[str]) -> int:
    """Be `promptstitch serve`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["promptstitch", "serve", *arguments]
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def serve() -> None:
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(child(log, arguments))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
