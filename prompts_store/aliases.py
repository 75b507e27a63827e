"""Aliases: names that move. One belongs to (base, task, level) and points to a version of just these.

An alias moves only against the revision it was read at, so that of two people who move it at once one is told. A
revision is the id of the audit row that made it: it never comes back, not even after the alias was made anew.
"""

from __future__ import annotations

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from prompts_store.audit import AuditLog
from prompts_store.database import Repository
from prompts_store.errors import BadReference, Conflict, NotFound, PreconditionFailed, PreconditionRequired
from prompts_store.measurements import gain_shown
from prompts_store.paging import page
from prompts_store.records import LOCAL, Actor, Alias, Page
from prompts_store.reference import check_alias
from prompts_store.tables import AliasRow
from prompts_store.versions import live_row

ANY_REVISION = "*"


class Aliases(Repository):
    """Thread-safe."""

    def get(self, task: str, name: str, *, base: str, level: str, any_level: bool = False) -> Alias:
        """`any_level`: where there is none at `level`, the only one of this name. Raises NotFound."""
        with self.database.read() as session:
            return _record(self._row(session, task, name, base, level, any_level))

    def list(
        self,
        task: str | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
        base: str | None = None,
        level: str | None = None,
    ) -> Page[Alias]:
        """By task, name, level and base. `after` is the `next` of a former page. Raises BadReference."""
        query = select(AliasRow).where(AliasRow.namespace == self.namespace)
        for column, wanted in ((AliasRow.task, task), (AliasRow.base, base), (AliasRow.level, level)):
            if wanted is not None:
                query = query.where(column == wanted)
        key = (AliasRow.task, AliasRow.name, AliasRow.level, AliasRow.base)
        if after is not None:
            seen = after.split("/")
            if len(seen) != len(key):
                raise BadReference("after must be the `next` of a former answer", field="after")
            behind = [
                and_(*(c == s for c, s in zip(key[:i], seen[:i], strict=True)), key[i] > seen[i])
                for i in range(len(key))
            ]
            query = query.where(or_(*behind))
        with self.database.read() as session:
            rows = session.scalars(query.order_by(*key).limit(limit + 1)).all()
            return page(rows, limit, _record, lambda alias: f"{alias.task}/{alias.name}/{alias.level}/{alias.base}")

    def put(
        self,
        task: str,
        name: str,
        version: int,
        *,
        expected: str | None = None,
        gain_on: str | None = None,
        by: Actor = LOCAL,
    ) -> tuple[Alias, bool]:
        """Point the alias at this version, within the version's base and level; True: the alias is new.

        `expected` is the revision that it is moved from, "*" for any. A new alias needs none, nor one that points to
        this version already. `gain_on` are weights on which a measurement must have shown a gain. Raises BadReference,
        NotFound, Gone, Conflict where it has not, PreconditionRequired, PreconditionFailed, StorageFull.
        """
        check_alias(name)
        with self.database.write() as session:
            target = live_row(session, self.namespace, task, version)
            base, level = target.prompt.base, target.level
            if gain_on is not None and not gain_shown(session, self.namespace, task, version, gain_on):
                raise Conflict("gain_not_shown", _not_shown(f"{task}@{version}", gain_on))
            row = session.get(AliasRow, (self.namespace, task, name, level, base))
            if row is None and expected is not None:
                raise PreconditionFailed(f"there is no alias {task}:{name} at {level} that could be moved")
            if row is not None:
                _check_revision(row, expected)
                if row.version == version:
                    return _record(row), False
                if expected is None:
                    message = f"{task}:{name} at {level} points to {row.version}; moving it needs its revision"
                    raise PreconditionRequired(f"{message} (If-Match)", field="If-Match")
            before = None if row is None else str(row.version)
            revision = self._log.write(session, by, "alias.set", f"{task}:{name} {level} {base}", before, str(version))
            alias = row or AliasRow(namespace=self.namespace, task=task, name=name, level=level, base=base)
            alias.version, alias.revision, alias.updated_at, alias.updated_by = version, revision, self.now(), by.name
            session.add(alias)
            session.flush()
            session.refresh(alias)
            return _record(alias), row is None

    def delete(
        self, task: str, name: str, *, base: str, level: str, expected: str | None = None, by: Actor = LOCAL
    ) -> None:
        """Raises NotFound; PreconditionFailed for a revision that is stale; StorageFull."""
        with self.database.write() as session:
            row = self._row(session, task, name, base, level)
            _check_revision(row, expected)
            self._log.write(session, by, "alias.delete", f"{task}:{name} {level} {base}", str(row.version), None)
            session.delete(row)

    def _row(self, session: Session, task: str, name: str, base: str, level: str, any_level: bool = False) -> AliasRow:
        row = session.get(AliasRow, (self.namespace, task, name, level, base))
        if row is None and any_level:
            query = select(AliasRow).where(AliasRow.namespace == self.namespace, AliasRow.task == task)
            found = session.scalars(query.where(AliasRow.name == name, AliasRow.base == base).limit(2)).all()
            row = found[0] if len(found) == 1 else None
        if row is None:
            raise NotFound("alias", f"there is no alias {name[:128]!a} of task {task[:128]!a} at level {level[:64]!a}")
        return row

    @property
    def _log(self) -> AuditLog:
        return AuditLog(self.database, self.namespace, self.clock)


def names_of(session: Session, namespace: str, task: str, version: int) -> tuple[str, ...]:
    """The aliases that point to a version."""
    query = select(AliasRow.name).where(
        AliasRow.namespace == namespace, AliasRow.task == task, AliasRow.version == version
    )
    return tuple(session.scalars(query.order_by(AliasRow.name)))


def _check_revision(row: AliasRow, expected: str | None) -> None:
    if expected not in (None, ANY_REVISION, str(row.revision)):
        raise PreconditionFailed(
            f"{row.task}:{row.name} at {row.level} has moved since: it points to {row.version} now"
        )


def _not_shown(ref: str, weights: str) -> str:
    return (
        f"no measurement of {ref} on the weights {weights} has a gain whose interval lies above 0; measure it on them "
        f"(`promptstitch evaluate MODEL --prompt {ref} --text FILE`) and post gain, gain_low, gain_high to its "
        "measurements"
    )


def _record(row: AliasRow) -> Alias:
    return Alias(
        row.base,
        row.task,
        row.level,
        row.name,
        row.version,
        row.target.digest,
        str(row.revision),
        row.updated_at,
        row.updated_by,
    )
