"""Versions: which prompt a number of a task stands for. What a push or a delete is, `store.py` knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

from sqlalchemy import ColumnElement, Row, bindparam, func, select
from sqlalchemy.orm import Session

from prompts_store.database import Repository
from prompts_store.errors import Gone, NotFound
from prompts_store.golden import Golden
from prompts_store.paging import number, page
from prompts_store.prompt import Bos, Kind
from prompts_store.records import Page, TaskSummary, Version
from prompts_store.tables import PromptRow, VersionRow

_Group = Row[str, str, str, int, int, str]  # task, level, base, count, latest, newest

# Of a push, which goes on beside the tokens: built once, and read without objects.
_SAME = select(VersionRow.version).where(
    VersionRow.namespace == bindparam("namespace"),
    VersionRow.task == bindparam("task"),
    VersionRow.level == bindparam("level"),
    VersionRow.digest == bindparam("digest"),
    VersionRow.live == 1,
)
_KNOWN = select(PromptRow.size).where(
    PromptRow.namespace == bindparam("namespace"), PromptRow.digest == bindparam("digest")
)
_HIGHEST = select(func.max(VersionRow.version)).where(
    VersionRow.namespace == bindparam("namespace"), VersionRow.task == bindparam("task")
)


class Versions(Repository):
    """Thread-safe."""

    def get(self, task: str, version: int) -> Version:
        """A live version. Raises NotFound, Gone."""
        with self.database.read() as session:
            return as_version(live_row(session, self.namespace, task, version))

    def list(
        self,
        task: str,
        *,
        limit: int = 100,
        after: str | None = None,
        level: str | None = None,
        base: str | None = None,
    ) -> Page[Version]:
        """Live versions, oldest first; `after` is a version number.

        Raises NotFound for a task that the registry has never seen, BadReference for another `after`.
        """
        query = select(VersionRow).where(*_live(self.namespace, level, base), VersionRow.task == task)
        query = query.where(VersionRow.version > number(after)).order_by(VersionRow.version)
        with self.database.read() as session:
            rows = session.scalars(query.limit(limit + 1)).all()
            if not rows:
                check_seen(session, self.namespace, task)
            return page(rows, limit, as_version, lambda version: version.version)

    def tasks(
        self, *, limit: int = 100, after: str | None = None, level: str | None = None, base: str | None = None
    ) -> Page[TaskSummary]:
        """Tasks with live versions, by name; `after` is a task name. The filters choose what is counted, too."""
        live = _live(self.namespace, level, base)
        names = (
            select(VersionRow.task).distinct().where(*live, VersionRow.task > (after or "")).order_by(VersionRow.task)
        )
        count, latest, newest = func.count(), func.max(VersionRow.version), func.max(VersionRow.uploaded_at)
        groups = select(VersionRow.task, VersionRow.level, PromptRow.base, count, latest, newest).join(
            VersionRow.prompt
        )
        groups = groups.group_by(VersionRow.task, VersionRow.level, PromptRow.base)
        found_in: dict[str, list[_Group]] = defaultdict(list)
        with self.database.read() as session:
            found = session.scalars(names.limit(limit + 1)).all()
            for row in session.execute(groups.where(*live, VersionRow.task.in_(found))):
                found_in[row.task].append(row)
        return page(found, limit, lambda name: _summary(name, found_in[name]), lambda summary: summary.task)


def live_row(session: Session, namespace: str, task: str, version: int) -> VersionRow:
    """Raises NotFound, Gone."""
    row = session.get(VersionRow, (namespace, task, version))
    if row is None:
        check_seen(session, namespace, task)
        raise NotFound("version", f"there is no {task}@{version}")
    if row.live is None:
        raise Gone(f"{task}@{version} was deleted")
    return row


def find_live(session: Session, namespace: str, task: str, level: str, digest: str) -> int | None:
    """The number of the one live version of this prompt under (task, level)."""
    given = {"namespace": namespace, "task": task, "level": level, "digest": digest}
    return session.connection().execute(_SAME, given).scalar_one_or_none()


def is_known(session: Session, namespace: str, digest: str) -> bool:
    """Whether a version, live or not, ever held this prompt."""
    return session.connection().execute(_KNOWN, {"namespace": namespace, "digest": digest}).first() is not None


def next_number(session: Session, namespace: str, task: str) -> int:
    """One more than the task ever had: tombstones count."""
    highest: int | None = session.connection().execute(_HIGHEST, {"namespace": namespace, "task": task}).scalar_one()
    return (highest or 0) + 1


def check_seen(session: Session, namespace: str, task: str) -> None:
    """Raises NotFound for a task that never had a version."""
    query = select(VersionRow.version).where(VersionRow.namespace == namespace, VersionRow.task == task).limit(1)
    if session.scalars(query).first() is None:
        raise NotFound("task", f"no prompt was ever stored for task {task[:128]!a}")


def as_version(row: VersionRow) -> Version:
    return Version(
        task=row.task,
        version=row.version,
        level=row.level,
        digest=row.digest,
        kind=cast(Kind, row.prompt.kind),
        base=row.prompt.base,
        shape=tuple(row.prompt.shape),
        bos=cast(Bos, row.prompt.bos),
        chat_template=row.prompt.chat_template,
        weights=row.weights,
        train=row.train,
        created=row.created,
        size=row.prompt.size,
        uploaded_at=row.uploaded_at,
        uploaded_by=row.uploaded_by,
        deleted_at=row.deleted_at,
        golden=None if row.golden is None else Golden.parse(row.golden),
    )


def _live(namespace: str, level: str | None, base: str | None) -> list[ColumnElement[bool]]:
    rules: list[ColumnElement[bool]] = [VersionRow.namespace == namespace, VersionRow.live == 1]
    if level is not None:
        rules.append(VersionRow.level == level)
    if base is not None:
        rules.append(VersionRow.prompt.has(PromptRow.base == base))
    return rules


def _summary(task: str, groups: Sequence[_Group]) -> TaskSummary:
    """`groups`: one for every level and base of the task."""
    return TaskSummary(
        task,
        versions=sum(group[3] for group in groups),
        latest=max(group[4] for group in groups),
        levels=tuple(sorted({group[1] for group in groups})),
        bases=tuple(sorted({group[2] for group in groups})),
        updated_at=max(group[5] for group in groups),
    )
