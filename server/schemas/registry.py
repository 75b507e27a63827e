"""Prompts, versions, aliases, measurements and keys as JSON, and the few bodies that the registry's routes take."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Path, Query
from pydantic import Field

from prompts_store.measurements import MAX_GAIN
from prompts_store.records import Alias, ApiKey, Page, RecordedMeasurement, Scope, TaskSummary, Version
from prompts_store.reference import MAX_NAME
from server.schemas.common import Answer, Body, NoNull, example

TASK_PATTERN = r"^[a-z0-9]+([._-][a-z0-9]+)*$"
ALIAS_PATTERN = r"^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
LEVEL_PATTERN = r"^[a-z0-9.-]{1,64}$"
MAX_VERSION = 999_999_999
MAX_PAGE = 1000

Task = Annotated[str, Path(pattern=TASK_PATTERN, max_length=MAX_NAME)]
AliasName = Annotated[str, Path(pattern=ALIAS_PATTERN, max_length=128)]
Number = Annotated[int, Path(ge=1, le=MAX_VERSION)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
After = Annotated[str | None, NoNull, Query(min_length=1, max_length=512, description="`next` of the page before")]
LevelFilter = Annotated[str | None, Query(pattern=LEVEL_PATTERN)]
BaseFilter = Annotated[str | None, Query(pattern=DIGEST_PATTERN)]

T = TypeVar("T")
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$", max_length=64)]

Nats = Annotated[float, Field(ge=-MAX_GAIN, le=MAX_GAIN)]


class Listing(Answer, Generic[T]):
    """A page. `next` goes into `after`."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    next: str | None


class GoldenAnswer(Answer):
    """A self-test on the weights that the prompt was learned through, in nats per token. `not_checked`: why, if so."""

    expected: float
    found: float | None
    ok: bool | None
    not_checked: str | None


class VersionAnswer(Answer):
    """One version. `level` is what it was learned at, `weights` what through."""

    task: str
    version: int
    level: str
    digest: str
    kind: Literal["rows", "kv"]
    base: str
    num_virtual_tokens: int
    hidden_size: int | None
    bos: Literal["tokenizer", "none", "after_prompt"]
    chat_template: str
    weights: str | None
    train: dict[str, Any] | None
    created: str | None
    size: int
    uploaded_at: str
    uploaded_by: str
    golden: GoldenAnswer | None


class UploadAnswer(VersionAnswer):
    """`base_bound`: the file named no base and was bound to the one that is served."""

    base_bound: bool


class TaskAnswer(Answer):
    task: str
    versions: int
    latest: int
    levels: list[str]
    bases: list[str]
    updated_at: str


class AliasAnswer(Answer):
    task: str
    alias: str
    base: str
    level: str
    version: int
    digest: str
    updated_at: str
    updated_by: str


class TaskListing(Listing[VersionAnswer]):
    """The versions of a task, and all its aliases."""

    task: str
    aliases: list[AliasAnswer]


class AliasBody(Body):
    model_config = example(version=1)

    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]


class MeasurementBody(Body):
    """A number measured on a served model. `dataset` is the digest of the scored data."""

    model_config = example(
        metric="perplexity", value=21.3, dataset="sha256:" + "0" * 64, split="select", served_level="w3g64"
    )

    metric: Word
    value: float
    dataset: Digest
    split: Annotated[Word, Field(description="resolution reads `select`, also if none is given")] | None = None
    served_level: Annotated[str, Field(pattern=LEVEL_PATTERN)]
    served_weights: Digest | None = None
    scored_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    gain: Annotated[Nats, Field(description="nats per token saved against no prompt, on the same tokens")] | None = None
    gain_low: Annotated[Nats, Field(description="of its 95 % interval, paired bootstrap by document")] | None = None
    gain_high: Nats | None = None


class MeasurementAnswer(Answer):
    id: int
    task: str
    version: int
    metric: str
    value: float
    dataset: str
    split: str
    served_level: str
    served_weights: str | None
    scored_tokens: int | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    recorded_at: str
    recorded_by: str


class KeyBody(Body):
    model_config = example(name="app", scopes=["infer"])

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\x20-\x7e]+$")]
    scopes: Annotated[list[Scope], Field(fail_fast=True, min_length=1, max_length=8)]


class KeyAnswer(Answer):
    id: str
    name: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class NewKeyAnswer(KeyAnswer):
    """`secret` is told this once."""

    secret: str


def listing(page: Page[Any], shown: list[dict[str, Any]]) -> dict[str, Any]:
    """A page of these objects."""
    return {"object": "list", "data": shown, "has_more": page.next is not None, "next": page.next}


def show_version(version: Version, golden: dict[str, Any] | None) -> dict[str, Any]:
    """A VersionAnswer; `golden` is a GoldenAnswer."""
    shown = {name: value for name, value in asdict(version).items() if name not in ("shape", "deleted_at", "golden")}
    size = {"num_virtual_tokens": version.num_virtual_tokens, "hidden_size": version.hidden_size}
    return {**shown, **size, "golden": golden}


def show_task(summary: TaskSummary) -> dict[str, Any]:
    """A TaskAnswer."""
    return asdict(summary)


def show_alias(alias: Alias) -> dict[str, Any]:
    """An AliasAnswer; the revision is its ETag."""
    shown = {name: value for name, value in asdict(alias).items() if name not in ("name", "revision")}
    return {**shown, "alias": alias.name}


def show_measurement(recorded: RecordedMeasurement) -> dict[str, Any]:
    """A MeasurementAnswer."""
    shown = asdict(recorded)
    return {**shown.pop("measurement"), **shown}


def show_key(key: ApiKey) -> dict[str, Any]:
    """A KeyAnswer."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }
