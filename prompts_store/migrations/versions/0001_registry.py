"""The registry's first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _create_books()
    _create_registry()
    _create_pointers()


def _create_books() -> None:
    op.create_table(
        "api_keys",
        sa.Column("serial", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.String(length=27), nullable=False),
        sa.Column("revoked_at", sa.String(length=27), nullable=True),
        sa.PrimaryKeyConstraint("serial", name="pk_api_keys"),
        sa.UniqueConstraint("id", name="uq_api_keys_id"),
        sa.UniqueConstraint("secret_sha256", name="uq_api_keys_secret_sha256"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("at", sa.String(length=27), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("address", sa.String(length=128), nullable=True),
        sa.Column("request_id", sa.String(length=128), nullable=True),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=512), nullable=False),
        sa.Column("before", sa.String(length=256), nullable=True),
        sa.Column("after", sa.String(length=256), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_table(
        "idempotency",
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("key", sa.String(length=512), nullable=False),
        sa.Column("fingerprint", sa.String(length=128), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("created_at", sa.String(length=27), nullable=False),
        sa.PrimaryKeyConstraint("namespace", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"], unique=False)


def _create_registry() -> None:
    op.create_table(
        "prompts",
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("base", sa.String(length=71), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("bos", sa.String(length=16), nullable=False),
        sa.Column("chat_template", sa.String(length=71), nullable=False),
        sa.Column("blob", sa.String(length=71), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("namespace", "digest", name="pk_prompts"),
    )
    op.create_table(
        "versions",
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=128), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("level", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("live", sa.Integer(), nullable=True),
        sa.Column("weights", sa.String(length=71), nullable=True),
        sa.Column("train", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created", sa.String(length=40), nullable=True),
        sa.Column("uploaded_at", sa.String(length=27), nullable=False),
        sa.Column("uploaded_by", sa.String(length=128), nullable=False),
        sa.Column("deleted_at", sa.String(length=27), nullable=True),
        sa.ForeignKeyConstraint(
            ["namespace", "digest"], ["prompts.namespace", "prompts.digest"], name="fk_versions_prompts"
        ),
        sa.PrimaryKeyConstraint("namespace", "task", "version", name="pk_versions"),
        sa.UniqueConstraint(
            "namespace", "task", "level", "digest", "live", name="uq_versions_namespace_task_level_digest_live"
        ),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"], unique=False)


def _create_pointers() -> None:
    op.create_table(
        "aliases",
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("level", sa.String(length=64), nullable=False),
        sa.Column("base", sa.String(length=71), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.String(length=27), nullable=False),
        sa.Column("updated_by", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(
            ["namespace", "task", "version"],
            ["versions.namespace", "versions.task", "versions.version"],
            name="fk_aliases_versions",
        ),
        sa.PrimaryKeyConstraint("namespace", "task", "name", "level", "base", name="pk_aliases"),
    )
    op.create_table(
        "measurements",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("dataset", sa.String(length=71), nullable=False),
        sa.Column("split", sa.String(length=64), nullable=False),
        sa.Column("served_level", sa.String(length=64), nullable=False),
        sa.Column("served_weights", sa.String(length=71), nullable=True),
        sa.Column("scored_tokens", sa.BigInteger(), nullable=True),
        sa.Column("recorded_at", sa.String(length=27), nullable=False),
        sa.Column("recorded_by", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(
            ["namespace", "task", "version"],
            ["versions.namespace", "versions.task", "versions.version"],
            name="fk_measurements_versions",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_measurements"),
    )
    op.create_index(
        "ix_measurements_namespace_task_version", "measurements", ["namespace", "task", "version"], unique=False
    )
