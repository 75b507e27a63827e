"""API keys. Knows no HTTP.

A secret is 32 random bytes; the store keeps its SHA-256, enough to know it again and of no use to a thief.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import cast

from sqlalchemy import select

from prompts_store.audit import AuditLog
from prompts_store.database import Repository
from prompts_store.errors import BadKey, NotFound
from prompts_store.paging import number, page
from prompts_store.records import LOCAL, SCOPES, Actor, ApiKey, Page, Scope
from prompts_store.tables import ApiKeyRow

PREFIX = "ps_"
SECRET_BYTES = 32
MAX_NAME = 64


class ApiKeys(Repository):
    """Thread-safe."""

    def create(self, name: str, scopes: Iterable[Scope], *, by: Actor = LOCAL) -> tuple[ApiKey, str]:
        """The key and its secret (`ps_…`), which is told this once. Raises BadKey, StorageFull."""
        wanted = frozenset(scopes)
        if unknown := sorted(wanted - set(SCOPES)):
            raise BadKey(f"unknown scope {unknown[0]!r}; scopes are {', '.join(SCOPES)}", field="scopes")
        if not wanted:
            raise BadKey(f"a key needs at least one scope of {', '.join(SCOPES)}", field="scopes")
        if not (1 <= len(name) <= MAX_NAME and name.isprintable()):
            raise BadKey(f"name must be 1 to {MAX_NAME} printable characters", field="name")
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        row = ApiKeyRow(
            id=f"key_{secrets.token_hex(8)}",
            namespace=self.namespace,
            name=name,
            secret_sha256=_hash(secret),
            scopes=" ".join(sorted(wanted)),
            created_at=self.now(),
        )
        with self.database.write() as session:
            session.add(row)
            self._log.write(session, by, "key.create", row.id, None, row.scopes)
        return _key(row), secret

    def list(self, *, limit: int = 100, after: str | None = None) -> Page[ApiKey]:
        """Oldest first, revoked ones too; `after` is the `next` of a former page. Raises BadReference."""
        query = select(ApiKeyRow).where(ApiKeyRow.namespace == self.namespace, ApiKeyRow.serial > number(after))
        with self.database.read() as session:
            rows = session.scalars(query.order_by(ApiKeyRow.serial).limit(limit + 1)).all()
            serials = {row.id: row.serial for row in rows}
            return page(rows, limit, _key, lambda key: serials[key.id])

    def revoke(self, key_id: str, *, by: Actor = LOCAL) -> None:
        """From now on the secret is nothing. Raises NotFound, for a revoked key too."""
        query = select(ApiKeyRow).where(ApiKeyRow.namespace == self.namespace, ApiKeyRow.id == key_id)
        with self.database.write() as session:
            row = session.scalars(query).one_or_none()
            if row is None or row.revoked_at is not None:
                raise NotFound("key", f"there is no live key {key_id[:64]!a}")
            row.revoked_at = self.now()
            self._log.write(session, by, "key.revoke", row.id, row.scopes, None)

    def lookup(self, secret: str) -> ApiKey | None:
        """The live key of this secret, of whatever namespace, or None."""
        digest = _hash(secret)
        with self.database.read() as session:
            row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.secret_sha256 == digest)).one_or_none()
            if row is None or not hmac.compare_digest(row.secret_sha256, digest) or row.revoked_at is not None:
                return None
            return _key(row)

    def any(self) -> bool:
        """Whether a key was ever made, in whatever namespace: revoking the last one must not open the doors."""
        with self.database.read() as session:
            return session.scalars(select(ApiKeyRow.id).limit(1)).first() is not None

    @property
    def _log(self) -> AuditLog:
        return AuditLog(self.database, self.namespace, self.clock)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: ApiKeyRow) -> ApiKey:
    scopes = frozenset(cast(Scope, scope) for scope in row.scopes.split())
    return ApiKey(row.id, row.name, scopes, row.namespace, row.created_at, row.revoked_at)
