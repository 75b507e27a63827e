"""The audit log: who changed what, in the same transaction as the change. Only added to."""

from __future__ import annotations

from typing import cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from prompts_store.database import Repository, insert
from prompts_store.paging import number, page
from prompts_store.records import Action, Actor, AuditEntry, Page
from prompts_store.tables import AuditRow


class AuditLog(Repository):
    """Thread-safe."""

    def list(self, *, limit: int = 100, after: str | None = None) -> Page[AuditEntry]:
        """Oldest first; `after` is an id. Raises BadReference for another `after`."""
        query = select(AuditRow).where(AuditRow.namespace == self.namespace, AuditRow.id > number(after))
        with self.database.read() as session:
            rows = session.scalars(query.order_by(AuditRow.id).limit(limit + 1)).all()
            return page(rows, limit, _entry, lambda entry: entry.id)

    def write(
        self, session: Session, by: Actor, action: Action, subject: str, before: str | None, after: str | None
    ) -> int:
        """Add an entry to a transaction; its id, which no other entry ever has."""
        row = AuditRow(
            namespace=self.namespace,
            at=self.now(),
            actor=by.name,
            address=by.address,
            request_id=by.request_id,
            action=action,
            subject=subject,
            before=before,
            after=after,
        )
        return int(insert(session, row)[0])


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        row.id,
        row.at,
        row.actor,
        row.address,
        row.request_id,
        cast(Action, row.action),
        row.subject,
        row.before,
        row.after,
    )
