"""Rounds: contestants take turns under each load of a plan, ours and the peers' servers all warm and idle meanwhile.

Knows servers, loads and what they did; draws no conclusions, `bench.verdict` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.fidelity import Fidelity, Measure
from bench.load import Pace, first_tokens, run
from bench.machine import Reading, wait_until_quiet
from bench.plan import Load, Plan
from bench.result import FirstToken, Result, Start
from bench.server import Contestant, Running, serving
from bench.workload import Job, Workload

SEEDS_A_ROUND = 32  # so that no text is sent twice to one process: one for each load, and for each wave that warms up


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one contestant in one round. CPU in cores kept busy while it lasted."""

    round: int
    contestant: str
    load: str
    figures: Result | FirstToken | Fidelity | Start
    rate: float | None  # requests a second that were sent, where the load says them
    server_cpu: float
    others_cpu: float  # neither the server nor the load generator: what makes a figure doubtful
    quiet: bool  # the machine was idle just before
    beyond_model_mb: float | None  # anonymous memory beyond weights and KV pages, where the server tells those

    def figure(self, name: str) -> float | None:
        """A figure by its name."""
        found = {**asdict(self), **self.figures.as_json()}[name]
        return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class Race:
    """A plan for a lineup. `prompts` are names of soft prompts that contestants can be asked for, in order of rank, and
    `upload` is one of them as bytes. Texts are cut from `corpus` or, without one, made of random words.

    Before each measurement it waits up to `patience` seconds for an idle machine. Logs of the servers go to `logs`.
    """

    plan: Plan
    tokenizer: Tokenizer
    prompts: tuple[str, ...]
    upload: bytes = b""
    corpus: Path | None = None
    patience: float = 0.0
    logs: Path = Path("runs")

    def run(self, lineup: Sequence[Contestant], rounds: int) -> Iterator[Measured]:
        """All rounds, one measurement after the other; fidelity in the first alone, since greedy answers do not change.

        Raises RuntimeError if a server does not start.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            up: dict[str, Running] = {}
            truths: dict[str, Measure] = {}
            for number in range(rounds):
                capacities: dict[tuple[str, str], float] = {}
                for load in self.plan.loads.values():
                    for contestant in lineup:
                        if load not in self.plan.needs(contestant.name):
                            continue
                        if load.kind == "fidelity" and number:
                            continue
                        if load.kind == "start":
                            yield self._start(number, contestant)
                            continue
                        if contestant.name not in up:
                            up[contestant.name] = stack.enter_context(self._warm(contestant))
                        if contestant.name == load.truth:
                            truths[load.name] = self._truth(contestant, up[contestant.name], load)
                        rate = capacities.get((load.capacity, load.capacity_of))
                        given = (None if rate is None else rate * load.share, truths.get(load.name))
                        measured = self._measure(number, contestant, up[contestant.name], load, *given)
                        if isinstance(measured.figures, Result):
                            capacities[load.name, contestant.name] = measured.figures.requests_per_second
                        yield measured

    @contextlib.contextmanager
    def _warm(self, contestant: Contestant) -> Iterator[Running]:
        """The contestant, serving, after a wave of each kind that it will be asked."""
        with serving(contestant, self.logs / f"{contestant.name}.log") as server:
            for i, load in enumerate(self.plan.needs(contestant.name)):
                if load.kind == "closed":
                    each = max(load.workload.concurrency, load.prompts)  # every prompt has been asked for once
                    shape = replace(load.workload, requests=each, zipf=0.0)
                    jobs = self._jobs(load, shape, SEEDS_A_ROUND // 2 + i)
                    run(server.url, jobs, contestant.form, Pace(shape.concurrency))
            yield server

    def _truth(self, contestant: Contestant, server: Running, load: Load) -> Measure:
        return Measure.of(server.url, self._jobs(load, load.workload, self._seed(0, load)), contestant.form)

    def _seed(self, number: int, load: Load) -> int:
        return number * SEEDS_A_ROUND + list(self.plan.loads).index(load.name)

    def _measure(
        self,
        number: int,
        contestant: Contestant,
        server: Running,
        load: Load,
        rate: float | None,
        truth: Measure | None,
    ) -> Measured:
        seed = self._seed(number, load)
        jobs = self._jobs(load, load.workload, seed)
        if (load.kind == "open" and rate is None) or (load.kind == "fidelity" and truth is None):
            raise RuntimeError(f"the load {load.name} goes by {load.capacity_of or load.truth}, which takes no part")
        quiet = wait_until_quiet(self.patience)
        before, server_before = Reading.now(), server.cpu_seconds()
        figures: Result | FirstToken | Fidelity
        if load.kind == "first token":
            figures = first_tokens(server.url, jobs, contestant.form)
        elif truth is not None:
            figures = truth.compare(server.url, contestant.form)
        else:
            pace = Pace(load.workload.concurrency, rate, load.hang_up, load.uploads, seed)
            figures = run(server.url, jobs, contestant.form, pace, upload=(contestant.uploads, self.upload))
        after = Reading.now()
        server_cpu = (server.cpu_seconds() - server_before) / (after.at - before.at)
        others = max(0.0, after.busy_cores_since(before) - server_cpu - figures.client_cpu)
        beyond = None
        if contestant.model_bytes is not None:
            beyond = (server.anonymous_bytes() - contestant.model_bytes(server.url)) / 1e6
        return Measured(number, contestant.name, load.name, figures, rate, server_cpu, others, quiet, beyond)

    def _start(self, number: int, contestant: Contestant) -> Measured:
        quiet = wait_until_quiet(self.patience)
        before = Reading.now()
        job = Workload(1, 1, max_tokens=1, seed=number).jobs(self.tokenizer, self.corpus)
        bare = replace(contestant, prepare=None)
        with serving(bare, self.logs / f"{contestant.name}.start.log", again=True) as server:
            answer = run(server.url, job, contestant.form, Pace(1), stream=False)
            after = Reading.now()
            figures = Start(answer.errors, server.start_seconds, after.at - server.started_at)
            busy = server.cpu_seconds() / (after.at - server.started_at)
        others = max(0.0, after.busy_cores_since(before) - busy)
        return Measured(number, contestant.name, "start", figures, None, busy, others, quiet, None)

    def _jobs(self, load: Load, shape: Workload, seed: int) -> list[Job]:
        """Of the same lengths in all loads of a round: a ratio of two of them is of as much text."""
        names = self.prompts[: load.prompts] or (None,)
        return replace(shape, prompts=names, seed=seed, sizes=seed // SEEDS_A_ROUND).jobs(self.tokenizer, self.corpus)


def told(measured: Measured) -> dict[str, Any]:
    """As JSON."""
    return {**asdict(measured), "figures": measured.figures.as_json()}
