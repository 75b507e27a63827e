"""Requests that may be sent twice: the second gets the first one's answer. Knows no HTTP beyond a status and a text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sqlalchemy import delete

from prompts_store.database import Repository, timestamp
from prompts_store.tables import IdempotencyRow

REMEMBERED = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Begun:
    """new: go on, then `complete` or `forget`. replay: give this `status` and `body` again. in_progress: the first
    request is under way. mismatch: the key was used for another body."""

    state: Literal["new", "replay", "in_progress", "mismatch"]
    status: int | None = None
    body: str | None = None


class Idempotency(Repository):
    """Thread-safe. A key is what makes two requests the same one: the caller puts in who asks, and for what."""

    def begin(self, key: str, fingerprint: str) -> Begun:
        """Claim `key` (at most 512 characters) for a body of this fingerprint (at most 128). Raises StorageFull."""
        expired = timestamp(self.clock() - REMEMBERED)
        with self.database.write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < expired))
            row = session.get(IdempotencyRow, (self.namespace, key))
            if row is None:
                session.add(
                    IdempotencyRow(namespace=self.namespace, key=key, fingerprint=fingerprint, created_at=self.now())
                )
                return Begun("new")
            if row.fingerprint != fingerprint:
                return Begun("mismatch")
            return Begun("in_progress") if row.status is None else Begun("replay", row.status, row.body)

    def complete(self, key: str, status: int, body: str) -> None:
        """Remember the answer, for 24 h since `begin`. Raises StorageFull."""
        with self.database.write() as session:
            row = session.get(IdempotencyRow, (self.namespace, key))
            if row is not None:
                row.status, row.body = status, body

    def forget(self, key: str) -> None:
        """Let the request be tried anew: it failed on our side. Raises StorageFull."""
        with self.database.write() as session:
            row = session.get(IdempotencyRow, (self.namespace, key))
            if row is not None:
                session.delete(row)

    def recover(self) -> None:
        """Forget what was under way when the last process ended, in every namespace."""
        with self.database.write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.status.is_(None)))
