"""The prompts that a new registry starts with. Knows files and the registry, and what the engine can serve."""

from __future__ import annotations

import logging

from engine.api import Engine
from prompts_store.errors import InvalidArtifact
from prompts_store.file import PromptFile, read_prompt
from prompts_store.store import PromptStore
from server.golden import GoldenTests
from server.settings import Settings
from server.uploads import limits_of

logger = logging.getLogger("promptstitch.server")


def seed(store: PromptStore, engine: Engine, settings: Settings, golden: GoldenTests) -> None:
    """Put the seed prompts into a registry that never held one. One of another base is passed over, and said so.

    Raises InvalidArtifact for a file that no server could take, or whose self-test fails on the weights served here.
    """
    if store.stats().versions:
        return
    files: list[PromptFile] = []
    for path in settings.seed_prompts:
        try:
            file = read_prompt(path, limits_of(engine.info, settings))
        except InvalidArtifact as error:
            if error.code != "base_model_mismatch":
                raise
            logger.warning("seed prompt %s is for another base model and is left out", path.name)
            continue
        golden.accept(engine, file)
        if file.provenance.task is None:
            raise InvalidArtifact("task_unknown", f"seed prompt {path.name} names no task", "task")
        files.append(file)
    for version in store.seed(files):
        logger.info("seeded %s@%s of level %s", version.task, version.version, version.level)
