"""The registry's tables, as SQLAlchemy sees them. No rules, no queries; `migrations/` creates the same.

Every row belongs to a namespace, which is part of every key. Rows of `prompts`, `versions` and `audit` are never
deleted: a version's number and an alias's revision (the id of its audit row) can therefore never come back.
"""

from __future__ import annotations

from typing import Annotated, Any

from sqlalchemy import JSON, BigInteger, ForeignKeyConstraint, Index, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Namespace = Annotated[str, mapped_column(String(128), primary_key=True)]
Name = Annotated[str, mapped_column(String(128))]
NameKey = Annotated[str, mapped_column(String(128), primary_key=True)]
Digest = Annotated[str, mapped_column(String(71))]
DigestKey = Annotated[str, mapped_column(String(71), primary_key=True)]
Level = Annotated[str, mapped_column(String(64))]
LevelKey = Annotated[str, mapped_column(String(64), primary_key=True)]
Time = Annotated[str, mapped_column(String(27))]  # UTC, ISO 8601, always of one width, so that it sorts as text
Serial = Annotated[int, mapped_column(primary_key=True, autoincrement=True)]

_VERSION = ["versions.namespace", "versions.task", "versions.version"]


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class PromptRow(Base):
    """A soft prompt's identity, and the blob that holds its rows. `size` in bytes."""

    __tablename__ = "prompts"

    namespace: Mapped[Namespace]
    digest: Mapped[DigestKey]
    kind: Mapped[str] = mapped_column(String(8))
    base: Mapped[Digest]
    shape: Mapped[list[int]] = mapped_column(JSON)
    bos: Mapped[str] = mapped_column(String(16))
    chat_template: Mapped[Digest]
    blob: Mapped[Digest]
    size: Mapped[int] = mapped_column(BigInteger)

    versions: Mapped[list[VersionRow]] = relationship(viewonly=True)


class VersionRow(Base):
    """A prompt under a task. `live` is 1, or NULL for a tombstone: NULLs are distinct to a unique constraint."""

    __tablename__ = "versions"
    __table_args__ = (
        ForeignKeyConstraint(["namespace", "digest"], ["prompts.namespace", "prompts.digest"]),
        UniqueConstraint("namespace", "task", "level", "digest", "live"),
    )

    namespace: Mapped[Namespace]
    task: Mapped[NameKey]
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    level: Mapped[Level]
    digest: Mapped[Digest] = mapped_column(index=True)
    live: Mapped[int | None]
    weights: Mapped[Digest | None]
    train: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[str | None] = mapped_column(String(40))
    golden: Mapped[str | None] = mapped_column(Text)  # as in the file
    uploaded_at: Mapped[Time]
    uploaded_by: Mapped[Name]
    deleted_at: Mapped[Time | None]

    prompt: Mapped[PromptRow] = relationship(lazy="joined", innerjoin=True, viewonly=True)


class AliasRow(Base):
    """A name within (base, task, level)."""

    __tablename__ = "aliases"
    __table_args__ = (ForeignKeyConstraint(["namespace", "task", "version"], _VERSION),)

    namespace: Mapped[Namespace]
    task: Mapped[NameKey]
    name: Mapped[NameKey]
    level: Mapped[LevelKey]
    base: Mapped[DigestKey]
    version: Mapped[int]
    revision: Mapped[int]
    updated_at: Mapped[Time]
    updated_by: Mapped[Name]

    target: Mapped[VersionRow] = relationship(lazy="joined", innerjoin=True, viewonly=True)


class MeasurementRow(Base):
    """A number measured of a version through a model."""

    __tablename__ = "measurements"
    __table_args__ = (
        ForeignKeyConstraint(["namespace", "task", "version"], _VERSION),
        Index(None, "namespace", "task", "version"),
    )

    id: Mapped[Serial]
    namespace: Mapped[Name]
    task: Mapped[Name]
    version: Mapped[int]
    metric: Mapped[str] = mapped_column(String(64))
    value: Mapped[float]
    dataset: Mapped[Digest]
    split: Mapped[str] = mapped_column(String(64))
    served_level: Mapped[Level]
    served_weights: Mapped[Digest | None]
    scored_tokens: Mapped[int | None] = mapped_column(BigInteger)
    gain: Mapped[float | None]
    gain_low: Mapped[float | None]
    gain_high: Mapped[float | None]
    recorded_at: Mapped[Time]
    recorded_by: Mapped[Name]


class AuditRow(Base):
    """Who changed what; only ever added to."""

    __tablename__ = "audit"

    id: Mapped[Serial]
    namespace: Mapped[Name]
    at: Mapped[Time]
    actor: Mapped[Name]
    address: Mapped[Name | None]
    request_id: Mapped[Name | None]
    action: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(512))
    before: Mapped[str | None] = mapped_column(String(256))
    after: Mapped[str | None] = mapped_column(String(256))


class ApiKeyRow(Base):
    """An API key; its secret is known by hash alone. `serial` orders the list."""

    __tablename__ = "api_keys"

    serial: Mapped[Serial]
    id: Mapped[str] = mapped_column(String(32), unique=True)
    namespace: Mapped[Name]
    name: Mapped[Name]
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[str] = mapped_column(String(128))  # separated by spaces
    created_at: Mapped[Time]
    revoked_at: Mapped[Time | None]


class IdempotencyRow(Base):
    """An answer to give again. `status` is NULL while the first request is under way."""

    __tablename__ = "idempotency"

    namespace: Mapped[Namespace]
    key: Mapped[str] = mapped_column(String(512), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(128))
    status: Mapped[int | None]
    body: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[Time] = mapped_column(index=True)
