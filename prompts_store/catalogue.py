"""What resolution reads of a task, out of the database. No rules: those are in `resolution.py`."""

from __future__ import annotations

from typing import cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from prompts_store.prompt import Kind
from prompts_store.resolution import METRIC, SPLIT, AliasTarget, Candidate, Score
from prompts_store.tables import AliasRow, MeasurementRow, PromptRow, VersionRow


def candidates(session: Session, namespace: str, task: str) -> list[Candidate]:
    """Every version the task ever had."""
    query = select(
        VersionRow.version,
        VersionRow.digest,
        PromptRow.base,
        VersionRow.level,
        VersionRow.weights,
        PromptRow.kind,
        VersionRow.live,
    ).join(VersionRow.prompt)
    rows = session.execute(query.where(VersionRow.namespace == namespace, VersionRow.task == task))
    return [
        Candidate(version, digest, base, level, weights, cast(Kind, kind), live is not None)
        for version, digest, base, level, weights, kind, live in rows
    ]


def alias_targets(session: Session, namespace: str, task: str) -> list[AliasTarget]:
    query = select(AliasRow.name, AliasRow.base, AliasRow.level, AliasRow.version)
    rows = session.execute(query.where(AliasRow.namespace == namespace, AliasRow.task == task))
    return [AliasTarget(*row) for row in rows]


def scores(session: Session, namespace: str, task: str, served_level: str) -> list[Score]:
    """Perplexities measured on the served level, on data that selection may look at."""
    query = select(
        MeasurementRow.version,
        MeasurementRow.value,
        MeasurementRow.dataset,
        MeasurementRow.served_weights,
        MeasurementRow.id,
    ).where(
        MeasurementRow.namespace == namespace,
        MeasurementRow.task == task,
        MeasurementRow.metric == METRIC,
        MeasurementRow.split == SPLIT,
        MeasurementRow.served_level == served_level,
    )
    return [Score(*row) for row in session.execute(query)]
