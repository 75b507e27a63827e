"""Models on this disk: which folder a name means, what the embedded one is, and an engine over one of them.

Knows where things lie and how settings become an engine; knows no HTTP and no registry.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from cli.output import CommandError, Steps
from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.served import ServedModel
from llama.identity import Identity
from llama.load import choose_compute, choose_device, choose_dtype, info, load
from llama.pull import default_folder, pull
from llama.tokenizer import HubTokenizer
from prompts_store.file import read_prompt
from server.settings import Settings

EMBEDDED = "smollm2-135m"
EMBEDDED_LEVEL = "w3g64"


def find_model(name: str) -> Path:
    """The folder of a checkpoint, given as such or by the name that it was pulled by. Raises CommandError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    pulled = default_folder(name)
    if pulled.is_dir():
        return pulled
    raise CommandError(f"there is no model {name}, neither as a folder nor pulled: `promptstitch pull {name}`")


def fetch(name: str, to: Path | None, steps: Steps, revision: str | None = None, base: str = "") -> Path:
    """`llama.pull.pull` with one bar, in place of those that the libraries below draw. Raises ModelError."""
    disable_progress_bar()
    disable_progress_bars()
    return pull(name, to, steps, revision, base)


def to_serve(settings: Settings, steps: Steps) -> tuple[Settings, Identity]:
    """The settings with the model's folder in `model`, and what its being the embedded one brings with it; who it is.

    By its name, the embedded model is fetched where it is missing and served at EMBEDDED_LEVEL unless a level is given;
    any folder is served as it is stored. The prompts that the package ships for a base are those that a new registry
    starts with, unless others are named.
    What can be found wrong without loading is found here. Raises CommandError, ModelError.
    """
    named = settings.model == EMBEDDED and not Path(EMBEDDED).is_dir()
    if named and not default_folder(EMBEDDED).is_dir():
        fetch(EMBEDDED, None, steps)
    folder = find_model(settings.model)
    level = settings.level
    identity = info(folder, level=level, base=settings.base).identity
    place = choose_device(settings.device)
    choose_compute(settings.compute, choose_dtype(settings.dtype, place, settings.compute), place, identity.level)
    if level is None and named and identity.level == "dense":
        level = EMBEDDED_LEVEL
        identity = info(folder, level=level, base=settings.base).identity
    seeds = settings.seed_prompts or tuple(shipped_prompts(identity.base))
    return settings.model_copy(update={"model": str(folder), "level": level, "seed_prompts": seeds}), identity


def shipped_prompts(base: str) -> list[Path]:
    """The prompt files of this base inside this package."""
    folder = Path(str(resources.files("prompts_store"))) / "seeds"
    return [path for path in sorted(folder.glob("*.safetensors")) if read_prompt(path).prompt.base == base]


def start_engine(settings: Settings, identity: Identity, steps: Steps) -> LocalEngine:
    """Load the model in the folder `settings.model` and start its loop. Raises ModelError, CommandError.

    `settings` and `identity` are those of `to_serve`.
    """
    folder = Path(settings.model)
    loaded = load(
        folder,
        level=settings.level,
        dtype=settings.dtype,
        device=settings.device,
        identity=identity,
        compute=settings.compute,
        progress=steps,
    )
    told = (identity.name, identity.base, identity.level, identity.weights, loaded.resident_bytes, loaded.compute)
    served = ServedModel(*told)
    try:
        return LocalEngine(loaded.model, HubTokenizer(folder), served, _options(settings))
    except ValueError as error:  # a KV cache too small to be of use
        raise CommandError(str(error)) from error


def _options(settings: Settings) -> EngineOptions:
    return EngineOptions(
        page_size=settings.page_size,
        kv_bytes=settings.kv_memory,
        kept_folder=_kept_folder(settings),
        kept_bytes=settings.kv_disk,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_queue,
        max_waiting_tokens=settings.max_queued_tokens,
        max_model_len=settings.max_model_len,
        max_virtual_tokens=settings.max_prompt_tokens,
        max_row_norm=settings.max_prompt_norm,
    )


def _kept_folder(settings: Settings) -> Path | None:
    """Where the store is, so that a volume which keeps one keeps the other."""
    beside = settings.blobs.parent if settings.blobs else Path(settings.store)
    return (settings.kv_folder or beside / "kv") if settings.kv_disk else None
