"""What the registry says: frozen values without a database behind them.

Times are UTC, ISO 8601. Digests are `sha256:<hex>`. A version is named by its task and its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from prompts_store.golden import Golden
from prompts_store.prompt import Bos, Kind

T = TypeVar("T")
Scope = Literal["infer", "prompts:read", "prompts:write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
Action = Literal["version.create", "version.delete", "alias.set", "alias.delete", "key.create", "key.revoke"]


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something: the id of an API key, or a name; with the request and address it came from."""

    name: str
    request_id: str | None = None
    address: str | None = None


LOCAL = Actor("local")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list. `next` goes into `after` for the following part; None at the end."""

    items: tuple[T, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Version:
    """One upload under a task. Everything but `deleted_at` never changes.

    `level` is what it was learned at and `weights` what it was learned through, if known, `golden` its self-test there;
    `created` is the time that its file tells, `uploaded_at` that of the upload; `size` counts the blob's bytes.
    """

    task: str
    version: int
    level: str
    digest: str
    kind: Kind
    base: str
    shape: tuple[int, ...]
    bos: Bos
    chat_template: str
    weights: str | None
    train: Mapping[str, Any] | None
    created: str | None
    size: int
    uploaded_at: str
    uploaded_by: str
    deleted_at: str | None
    golden: Golden | None = None

    @property
    def num_virtual_tokens(self) -> int:
        return self.shape[0] if self.kind == "rows" else self.shape[2]

    @property
    def hidden_size(self) -> int | None:
        return self.shape[1] if self.kind == "rows" else None


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A task with at least one live version. `latest` is the newest live number."""

    task: str
    versions: int
    latest: int
    levels: tuple[str, ...]
    bases: tuple[str, ...]
    updated_at: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A name within (base, task, level). `revision` is its ETag: a new one with every move, never one seen before."""

    base: str
    task: str
    level: str
    name: str
    version: int
    digest: str
    revision: str
    updated_at: str
    updated_by: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number of one prompt through one model. `dataset` is the digest of the scored data, `scored_tokens` counts
    text tokens, `served_weights` the model's weights if known.

    `split` says what the data was for: resolution reads `select` alone, so that `report` stays a fair test.
    `gain` is the nats per token that the prompt saves against no prompt on the same tokens, `gain_low` to `gain_high`
    its 95 % interval (paired bootstrap by document); all three or none.
    """

    metric: str
    value: float
    dataset: str
    split: str
    served_level: str
    served_weights: str | None = None
    scored_tokens: int | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True, slots=True)
class RecordedMeasurement:
    """A measurement of a version, as written down. Never changed; a later one of the same kind counts instead."""

    id: int
    task: str
    version: int
    measurement: Measurement
    recorded_at: str
    recorded_by: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `id` is public and names it in logs and audit."""

    id: str
    name: str
    scopes: frozenset[Scope]
    namespace: str
    created_at: str
    revoked_at: str | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who changed what. `before` and `after` are digests, or versions of an alias, or scopes of a key."""

    id: int
    at: str
    actor: str
    address: str | None
    request_id: str | None
    action: Action
    subject: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Live content: `tasks`, `versions`, `blob_bytes` (each blob once). The rest counts since the store was opened."""

    tasks: int
    versions: int
    blob_bytes: int
    integrity_failures: int
    orphans_removed: int
