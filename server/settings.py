"""What a server can be told: every value once, with its default, bounds and meaning.

A value comes from a flag, else from the environment (PROMPTSTITCH_PORT), else from a TOML file (`port = …`), else from
here. Unknown names are refused in all three. Knows neither the command line nor what the engine does with its part.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, ByteSize, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError as SourceError

from prompts_store.errors import BadLevel
from prompts_store.level import parse_level

PREFIX = "PROMPTSTITCH_"
_SERVICE = re.compile(PREFIX + r"(SERVICE_.*|PORT_\d+_.*)")
# Variables of the same prefix that belong to the command line, to the lab and to the tests.
FOREIGN = frozenset(PREFIX + name for name in ("CONFIG", "URL", "API_KEY", "DATA_ROOT", "FULL"))

Policy = Literal["exact", "transfer", "optional", "none"]
MIB = 1 << 20


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class SettingsError(Exception):
    """The settings do not hold. `faults` has one line for each, naming the setting and what it takes."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Settings(BaseSettings):
    """Frozen. Times in seconds, sizes in bytes (`256MiB` is understood), lengths in tokens."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True, protected_namespaces=()
    )

    # What is served.
    model: str = Field("smollm2-135m", min_length=1, description="checkpoint folder, or a name that was pulled")
    level: str | None = Field(None, description="compression level to quantise to while loading")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="compute dtype")
    compute: Literal["auto", "bf16", "int8"] = Field("auto", description="products of linears; int8 rounds inputs")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:1")
    base: str | None = Field(None, description="dense folder or digest, for a checkpoint without a manifest")
    served_model_name: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        description="its name in the API",
    )

    # Where prompts live.
    store: str = Field(
        str(platformdirs.user_data_path("promptstitch") / "store"),
        min_length=1,
        description="folder or SQLAlchemy URL",
    )
    blobs: Path | None = Field(None, description="folder of the prompts' bytes, where the store is a URL")
    seed_prompts: Paths = Field(
        (), description="prompt files that a registry without prompts for this base starts with"
    )
    resolution: Policy = Field("transfer", description="policy of a request that names none")
    prompt_cache: ByteSize = Field(ByteSize(256 * MIB), ge=0, description="memory for prompts read from the store")

    # The engine's.
    max_model_len: Count | None = Field(None, description="context in tokens, soft ones included")
    max_prompt_tokens: int = Field(512, ge=1, le=65_536, description="soft tokens that one prompt may have")
    max_prompt_norm: float = Field(
        1e4, gt=0, le=1e30, description="largest norm of a prompt's row, in largest norms of the embedding table's"
    )
    kv_memory: ByteSize | None = Field(
        None, gt=0, description="bytes of the KV cache, else 2 GiB, or 90 % of a GPU's rest less what steps take"
    )
    kv_disk: ByteSize = Field(
        ByteSize(1024 * MIB), ge=0, description="bytes of prompts' keys and values kept on disk; 0 keeps none"
    )
    kv_folder: Path | None = Field(None, description="where they are kept, else `kv` beside the prompts' bytes")
    page_size: int = Field(16, ge=1, le=1024, description="tokens in a page")
    max_running: int = Field(256, ge=1, le=4096, description="sequences in one batch")
    max_batch_tokens: int = Field(512, ge=16, le=65_536, description="tokens in one step, prefill and decode together")
    max_queue: int = Field(512, ge=1, le=1_000_000, description="requests that may wait")
    max_queued_tokens: Count = Field(1_000_000, description="text tokens that may wait")

    # Requests.
    max_tokens_default: Count | None = Field(
        None, description="max_tokens of chat and generate, else the whole context"
    )
    max_body: ByteSize = Field(ByteSize(4 * MIB), ge=1024, description="bytes of a JSON body")
    max_upload: ByteSize = Field(ByteSize(512 * MIB), ge=1024, description="bytes of an uploaded prompt")
    request_timeout: float = Field(600.0, gt=0, le=86_400, description="longest time that one request may take")
    receipt_timeout: float = Field(
        30.0, gt=0, le=3600, description="time a client has to send headers, and then a body"
    )
    key_concurrency: Count | None = Field(None, description="inference requests of one API key at once")

    # The server.
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="0 takes a free one")
    insecure: bool = Field(False, description="allow another host than loopback without an API key")
    allowed_hosts: Names = Field(
        (),
        description="Host names to answer to; empty: loopback's own where it is the host and no key exists, else any",
    )
    docs: bool = Field(True, description="serve /docs and /openapi.json")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of the log on stderr")
    drain: Seconds = Field(30.0, description="time that requests under way get after SIGTERM")
    drain_delay: Seconds = Field(0.0, description="time after SIGTERM in which new requests are still taken")
    liveness_timeout: float = Field(60.0, gt=0, le=3600, description="a step of the engine that takes longer is a hang")

    @field_validator("level")
    @classmethod
    def _check_level(cls, level: str | None) -> str | None:
        try:
            return level if level is None else str(parse_level(level))
        except BadLevel as error:
            raise ValueError(error.message) from None

    @field_validator("seed_prompts")
    @classmethod
    def _check_seeds(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise ValueError(f"no such file: {', '.join(missing)}")
        return paths

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("127.0.0.1", "localhost", "::1") or self.host.startswith("127.")


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Settings from flags (None = not given), the environment and a TOML file. Raises SettingsError with all faults."""
    faults = [
        _unknown(name, PREFIX) for name in os.environ if name.upper().startswith(PREFIX) and not _known_variable(name)
    ]
    if config is not None and not config.is_file():
        raise SettingsError([f"--config {config}: no such file"])

    class Configured(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            def environment() -> dict[str, Any]:
                return {name: value for name, value in env_settings().items() if not _of_a_service(str(value))}

            return init_settings, environment, TomlConfigSettingsSource(settings_cls, config)  # type: ignore[return-value]

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = Configured(**given)
    except ValidationError as error:
        faults += [_fault(item["loc"], item["type"], item["msg"]) for item in error.errors(include_input=False)]
    except (SourceError, ValueError) as error:  # a value or a TOML file that does not parse at all
        faults.append(f"{config or 'environment'}: {error}")
    if faults:
        raise SettingsError(faults)
    return settings


def _known_variable(name: str) -> bool:
    upper = name.upper()
    return (
        upper in FOREIGN
        or _SERVICE.fullmatch(upper) is not None
        or upper.removeprefix(PREFIX).lower() in Settings.model_fields
    )


def _of_a_service(value: str) -> bool:
    """Kubernetes tells every container of a service of this name where it is, in variables that look like ours."""
    return value.startswith("tcp://")


def _fault(location: tuple[int | str, ...], kind: str, message: str) -> str:
    name = str(location[0]) if location else "settings"
    if kind == "extra_forbidden":
        return _unknown(name)
    return f"{name} ({PREFIX}{name.upper()}): {message.removeprefix('Value error, ')}"


def _unknown(name: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(name.removeprefix(prefix).lower(), Settings.model_fields, n=1)
    meant = (prefix + near[0].upper() if prefix else near[0]) if near else None
    return f"{name}: no such setting" + (f"; did you mean {meant}?" if meant else "")
