"""What is evaluated: a loaded model and a prompt, from a file or as a server over this model would resolve it.

Knows models, prompt files and the registry; knows no figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.output import CommandError

if TYPE_CHECKING:
    from llama.load import LoadedModel
    from llama.tokenizer import HubTokenizer
    from prompts_store.prompt import SoftPrompt
    from server.settings import Settings

SEEDING_KV = 1 << 26  # bytes of the engine that tests a prompt of the registry


def told_of(
    loaded: LoadedModel, chosen: Settings, prompt: SoftPrompt | None, found: Mapping[str, Any] | None
) -> dict[str, Any]:
    told = loaded.identity
    return {
        "model": told.name,
        "level": told.level,
        "method": "while loading" if chosen.level else None,
        "base": told.base,
        "weights": told.weights,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "compute": loaded.compute,
        "device": str(loaded.model.device),
        "bytes": loaded.resident_bytes,
        "disk_bytes": loaded.disk_bytes,
        "prompt_digest": prompt and prompt.digest,
        "prompt": found,
    }


def find_prompt(
    name: str | None, loaded: LoadedModel, tokenizer: HubTokenizer, chosen: Settings
) -> tuple[SoftPrompt | None, dict[str, Any] | None]:
    """The prompt in a file, or that a reference resolves to as a server would, and what is told of it."""
    from engine.stitch import mismatch

    if name is None:
        return None, None
    if (path := Path(name).expanduser()).exists():
        prompt: SoftPrompt | None = prompt_from_file(path, loaded)
        found: dict[str, Any] = {"file": name}
    else:
        prompt, found = _from_store(name, loaded, tokenizer, chosen)
    if prompt is None:
        raise CommandError(f"--prompt: the store resolves {name} to no prompt (--resolution {chosen.resolution})")
    most = loaded.model.config.max_len
    if wrong := mismatch(prompt, loaded.model, loaded.identity.base, most, inf):
        raise CommandError(f"--prompt {name}: {wrong[1]}")
    told = {"kind": prompt.kind, "num_virtual_tokens": prompt.num_virtual_tokens, "bos": prompt.bos}
    return prompt, {**found, **told, "same_chat_template": prompt.chat_template == tokenizer.chat_template_digest}


def prompt_from_file(path: Path, loaded: LoadedModel) -> SoftPrompt:
    from prompts_store.file import Limits, read_prompt

    if path.is_dir():
        raise CommandError(f"{path} is a folder; an adapter becomes a prompt by `promptstitch prompts import-peft`")
    base, config = loaded.identity.base, loaded.model.config
    limits = Limits(
        base=base,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    return read_prompt(path, limits, default_base=base).prompt


def _from_store(
    name: str, loaded: LoadedModel, tokenizer: HubTokenizer, chosen: Settings
) -> tuple[SoftPrompt | None, dict[str, Any]]:
    """By the rules and with the self-test of a server over this model."""
    from cli.answer import find_stitch
    from cli.local import open_store
    from engine.engine import LocalEngine
    from engine.options import EngineOptions
    from engine.served import ServedModel
    from prompts_store.reference import parse_reference
    from prompts_store.resolution import Query

    query, told = Query(parse_reference(name), chosen.resolution), loaded.identity
    served = ServedModel(told.name, told.base, told.level, told.weights, loaded.resident_bytes)
    size = EngineOptions(kv_bytes=SEEDING_KV, max_virtual_tokens=loaded.model.config.max_len)
    with open_store(chosen) as store:
        engine = LocalEngine(loaded.model, tokenizer, served, size)
        try:
            stitch = find_stitch(store, query, engine, chosen, None)
            return (stitch.prompt, stitch.told(engine.info)) if stitch else (None, {})
        finally:
            engine.close()


def equal_prompt(file: Path, dense: LoadedModel, prompt: SoftPrompt) -> SoftPrompt:
    """The dense model's own prompt, of the kind and length of ours. Raises CommandError."""
    from prompts_store.file import read_prompt

    found = prompt_from_file(file, dense)
    if (level := read_prompt(file).provenance.level) not in (None, "dense"):
        raise CommandError(
            f"--dense-prompt {file} was learned at {level}; give one that was learned on the dense model"
        )
    if (found.kind, found.shape) != (prompt.kind, prompt.shape):
        raise CommandError(
            f"--dense-prompt {file} is {found.kind} {found.shape}, the prompt {prompt.kind} {prompt.shape}; only "
            "prompts of one kind and size can be held against each other"
        )
    return found
