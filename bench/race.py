"""Rounds: each contestant in turn is started, warmed up and given every workload.

Knows servers and loads; draws no conclusions, `bench.verdict` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from bench.load import first_tokens, run
from bench.machine import Reading, wait_until_quiet
from bench.result import FirstToken, Result
from bench.server import Contestant, Running, serving
from bench.workload import Job, Workload

STITCHED, BARE, FIRST_TOKEN = "stitched", "bare", "first token"
SEEDS_A_ROUND = 8  # so that no text is sent twice to one process


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload at one contestant in one round. CPU in cores kept busy while it lasted."""

    round: int
    contestant: str
    workload: str
    figures: Result | FirstToken
    server_cpu: float
    others_cpu: float  # neither the server nor the load generator: what makes a figure doubtful
    quiet: bool  # the machine was idle just before
    start_seconds: float  # from exec to ready
    rss_bytes: int  # right after, all processes of the server


@dataclass(frozen=True, slots=True)
class Race:
    """What every contestant is given: `stitched`, the same without prompts, and pairs for the time to the first token.

    Before each measurement it waits up to `patience` seconds for an idle machine. With `resident` all servers are
    started once and stay up, idle, while another is measured; else each is started anew in every round. Logs of the
    servers go to `logs`.
    """

    tokenizer: Tokenizer
    corpus: Path | None
    stitched: Workload
    pairs: int = 24
    patience: float = 0.0
    resident: bool = False
    logs: Path = Path("runs")

    def run(self, lineup: Sequence[Contestant], rounds: int) -> Iterator[Measured]:
        """All rounds, one measurement after the other. Raises RuntimeError if a server does not start."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            up = {c.name: stack.enter_context(self._warm(c, 0)) for c in lineup} if self.resident else {}
            for number in range(rounds):
                for contestant in lineup:
                    one = (
                        contextlib.nullcontext(up[contestant.name]) if self.resident else self._warm(contestant, number)
                    )
                    with one as server:
                        yield from self._measure_all(number, contestant, server)

    @contextlib.contextmanager
    def _warm(self, contestant: Contestant, number: int) -> Iterator[Running]:
        """The contestant, serving, after a wave of each kind."""
        with serving(contestant, self.logs / f"{contestant.name}.log") as server:
            for i, prompts in enumerate((self.stitched.prompts, (None,))):
                seed = number * SEEDS_A_ROUND + 3 + i
                wave = replace(self.stitched, requests=self.stitched.concurrency, prompts=prompts, seed=seed)
                run(server.url, self._jobs(wave), contestant.form, wave)
            yield server

    def _measure_all(self, number: int, contestant: Contestant, server: Running) -> Iterator[Measured]:
        seed = number * SEEDS_A_ROUND
        bare = replace(self.stitched, prompts=(None,), seed=seed)
        stitched = replace(self.stitched, seed=seed + 1)
        single = replace(self.stitched, requests=self.pairs + len(self.stitched.prompts), seed=seed + 2)
        calls: dict[str, Callable[[list[Job]], Result | FirstToken]] = {
            BARE: lambda jobs: run(server.url, jobs, contestant.form, bare),
            STITCHED: lambda jobs: run(server.url, jobs, contestant.form, stitched),
            FIRST_TOKEN: lambda jobs: first_tokens(server.url, jobs, contestant.form),
        }
        for (name, call), workload in zip(calls.items(), (bare, stitched, single), strict=True):
            jobs = self._jobs(workload)
            quiet = wait_until_quiet(self.patience)
            before, server_before = Reading.now(), server.cpu_seconds()
            figures = call(jobs)
            after = Reading.now()
            server_cpu = (server.cpu_seconds() - server_before) / (after.at - before.at)
            others = max(0.0, after.busy_cores_since(before) - server_cpu - figures.client_cpu)
            rss = server.rss_bytes()
            yield Measured(number, contestant.name, name, figures, server_cpu, others, quiet, server.start_seconds, rss)

    def _jobs(self, workload: Workload) -> list[Job]:
        return workload.jobs(self.tokenizer, self.corpus)
