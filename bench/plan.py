"""What a race asks and claims: `race.toml`, read.

Knows loads, claims and names; measures nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from bench.workload import Workload

FILE = Path(__file__).with_name("race.toml")
Kind = Literal["closed", "open", "first token", "fidelity", "start"]


@dataclass(frozen=True, slots=True)
class Load:
    """What is put on a server. `workload` names no prompts yet: `prompts` says how many."""

    name: str
    workload: Workload
    prompts: int = 0
    kind: Kind = "closed"
    uploads: float = 0.0  # prompts a second put into the registry meanwhile
    capacity: str = ""  # open: the load and
    capacity_of: str = ""  # the contestant whose requests a second are
    share: float = 1.0  # sent by this much
    hang_up: float = 0.0  # open: share of the clients that leave before their answer's end
    truth: str = ""  # fidelity: the contestant that says what the next token is

    @classmethod
    def of(cls, name: str, table: Mapping[str, Any]) -> Load:
        """From its table. Raises TypeError for a key that means nothing."""
        shape = {each.name for each in fields(Workload)} - {"prompts"}
        own = {key: value for key, value in table.items() if key not in shape}
        return cls(name, Workload(**{key: table[key] for key in shape & table.keys()}), **own)


@dataclass(frozen=True, slots=True)
class Claim:
    """Ours against the best of the peers, ourselves under another load, or a figure alone. See `race.toml`.

    `across`: their weights are not of one kind, so what each costs in quality is measured too.
    """

    line: str
    what: str
    load: str
    figure: str
    ours: Sequence[str]
    peers: Sequence[str] = ()
    peer_load: str = ""
    each: bool = False
    across: bool = False
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None

    @property
    def against(self) -> str:
        """The load of the other side; none where the figure stands alone."""
        return self.peer_load or (self.load if self.peers else "")

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def holds(self, value: float) -> bool:
        return value >= (self.at_least or 0.0) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, slots=True)
class Plan:
    """Loads in the order in which they are measured, and claims."""

    loads: Mapping[str, Load] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()

    @classmethod
    def read(cls, file: Path = FILE, only: Sequence[str] = ()) -> Plan:
        """All claims, or those of the lines in `only`. Raises ValueError where there is no such line."""
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        loads = {name: Load.of(name, table) for name, table in tables["loads"].items()}
        claims = tuple(Claim(**table) for table in tables["claims"])
        lines = dict.fromkeys(claim.line for claim in claims)
        if unknown := [line for line in only if line not in lines]:
            raise ValueError(f"there is no line {', '.join(unknown)}; lines are {', '.join(lines)}")
        return cls(loads, tuple(claim for claim in claims if not only or claim.line in only))

    def needs(self, contestant: str) -> list[Load]:
        """The loads that a contestant must be put under for the claims, in order."""
        names = set()
        for claim in self.claims:
            ours = matches(contestant, claim.ours)
            if ours:
                names.add(claim.load)
            if claim.against and (matches(contestant, claim.peers) or (ours and not claim.peers)):
                names.add(claim.against)
        names |= {
            load.capacity
            for claim in self.claims
            for load in (self.loads[claim.load],)
            if load.capacity_of == contestant
        }
        across = [name for claim in self.claims if claim.across for name in (*claim.ours, *claim.peers)]
        for load in self.loads.values():
            if load.kind == "fidelity" and across and matches(contestant, [load.truth, *across]):
                names.add(load.name)
        return [load for load in self.loads.values() if load.name in names]


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
