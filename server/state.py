"""What lives as long as the app, in one place and typed. The lifespan yields it; a route finds it on its request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from fastapi import Request

from prompts_store.store import PromptStore
from server.bridge import Bridge
from server.finder import PromptFinder
from server.golden import GoldenTests
from server.host import EngineHost
from server.keyring import KeyRing
from server.metrics import Metrics
from server.registry import Registry
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that routes use. `created` is the Unix time at which the app started."""

    settings: Settings
    store: PromptStore
    registry: Registry
    host: EngineHost
    finder: PromptFinder
    golden: GoldenTests
    keys: KeyRing
    bridge: Bridge
    metrics: Metrics
    created: int


class State(TypedDict):
    """The lifespan's state: what Starlette copies into every scope."""

    services: Services


def services_of(request: Request) -> Services:
    """The services of the app that this request came to."""
    services = request.state.services
    assert isinstance(services, Services)
    return services
