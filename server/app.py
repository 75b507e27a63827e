"""The application: its routes, its errors, and what lives as long as it does.

Gets an open store and a way to make an engine; makes everything else. The engine is loaded in the background, so that
probes are answered meanwhile. Knows no process: signals and sockets are `run.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI

from engine.api import Engine
from prompts_store.store import PromptStore
from server import errors
from server.auth import allowed_hosts, authorise, check_exposure, scope_of
from server.bridge import Bridge
from server.finder import PromptFinder
from server.golden import GoldenTests
from server.host import EngineHost
from server.keyring import KeyRing
from server.metrics import Metrics
from server.middleware import Edge
from server.openapi import routes_of
from server.registry import Registry
from server.routes import (
    aliases,
    chat,
    completions,
    docs,
    generate,
    health,
    keys,
    measurements,
    models,
    prompts,
    tokenize,
)
from server.seeds import seed
from server.settings import Settings
from server.state import Services, State

logger = logging.getLogger("promptstitch.server")

EngineFactory = Callable[[Settings], Engine]
Failed = Callable[[BaseException], None]
ROUTERS = [
    module.router
    for module in (
        generate,
        completions,
        chat,
        tokenize,
        models,
        prompts,
        aliases,
        measurements,
        keys,
        health,
    )
]


def create_app(
    settings: Settings,
    engine_factory: EngineFactory,
    store: PromptStore,
    on_failure: Failed = lambda error: None,
) -> FastAPI:
    """`store` stays its opener's to close. `on_failure` is told, on the loop, if the engine cannot be loaded.

    Raises SettingsError where these settings must not be served.
    """
    check_exposure(settings, store)
    metrics = Metrics()
    host = EngineHost(settings, metrics)
    golden = GoldenTests(lambda result: metrics.golden_tests.labels(result).inc())

    def load() -> Engine:
        engine = engine_factory(settings)
        seed(store, engine, settings, golden)
        return engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        services = _services(settings, store, host, golden, metrics)
        loading = asyncio.create_task(_load(host, load, on_failure))
        try:
            yield {"services": services}
        finally:
            loading.cancel()
            await asyncio.wait([loading])
            await host.close()

    app = FastAPI(
        title="promptstitch",
        version=version("promptstitch"),
        description="A compressed LLaMA with the right learned soft prompt in front of every request.",
        lifespan=lifespan,
        dependencies=[Depends(authorise)],
        openapi_url=None,
        redirect_slashes=False,
        telemetry=None,
    )
    app.state.host = host
    for router in [*ROUTERS, *([docs.router] if settings.docs else [])]:
        app.include_router(router)
    errors.install(app)
    metrics.watch(lambda: host.loaded, store.stats, settings.served_model_name, app.version)
    app.add_middleware(Edge, metrics=metrics, hosts=allowed_hosts(settings, store))
    _check_scopes(app)
    return app


def _services(
    settings: Settings, store: PromptStore, host: EngineHost, golden: GoldenTests, metrics: Metrics
) -> Services:
    """The parts of one app, on its running loop."""
    backend = "directory" if "://" not in settings.store else settings.store.partition(":")[0]
    registry = Registry(metrics, backend)
    return Services(
        settings=settings,
        store=store,
        registry=registry,
        host=host,
        finder=PromptFinder(store, registry, golden, settings.prompt_cache),
        golden=golden,
        keys=KeyRing(store, registry),
        bridge=Bridge(asyncio.get_running_loop()),
        metrics=metrics,
        created=int(time.time()),
    )


async def _load(host: EngineHost, load: Callable[[], Engine], on_failure: Failed) -> None:
    try:
        await host.load(load)
    except Exception as error:
        logger.exception("the model could not be loaded")
        on_failure(error)


def _check_scopes(app: FastAPI) -> None:
    """A route that names no scope is a mistake of ours, found before the first request."""
    if unnamed := [route.path for route in routes_of(app) if scope_of(route) is None]:
        raise ValueError(f"routes without a scope: {unnamed}")
