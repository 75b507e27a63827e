"""What was measured of a version through a model. Written down once, never changed; resolution reads it."""

from __future__ import annotations

import math
import re

from sqlalchemy import select
from sqlalchemy.orm import Session

from prompts_store.database import Repository
from prompts_store.errors import BadMeasurement
from prompts_store.level import parse_level
from prompts_store.paging import number, page
from prompts_store.records import LOCAL, Actor, Measurement, Page, RecordedMeasurement
from prompts_store.reference import is_digest
from prompts_store.tables import MeasurementRow
from prompts_store.versions import live_row

MAX_TOKENS = 1 << 53
MAX_GAIN = 1000.0  # nats per token
_WORD = re.compile(r"[a-z0-9]+(?:[._/-][a-z0-9]+)*")


class Measurements(Repository):
    """Thread-safe."""

    def add(self, task: str, version: int, measurement: Measurement, *, by: Actor = LOCAL) -> RecordedMeasurement:
        """Raises BadMeasurement, BadLevel, NotFound, Gone, StorageFull."""
        _check(measurement)
        with self.database.write() as session:
            live_row(session, self.namespace, task, version)
            row = MeasurementRow(
                namespace=self.namespace,
                task=task,
                version=version,
                metric=measurement.metric,
                value=float(measurement.value),
                dataset=measurement.dataset,
                split=measurement.split,
                served_level=measurement.served_level,
                served_weights=measurement.served_weights,
                scored_tokens=measurement.scored_tokens,
                gain=measurement.gain,
                gain_low=measurement.gain_low,
                gain_high=measurement.gain_high,
                recorded_at=self.now(),
                recorded_by=by.name,
            )
            session.add(row)
            session.flush()
            return _record(row)

    def list(self, task: str, version: int, *, limit: int = 100, after: str | None = None) -> Page[RecordedMeasurement]:
        """Oldest first; `after` is an id. Raises NotFound, Gone, BadReference."""
        query = select(MeasurementRow).where(
            MeasurementRow.namespace == self.namespace,
            MeasurementRow.task == task,
            MeasurementRow.version == version,
            MeasurementRow.id > number(after),
        )
        with self.database.read() as session:
            live_row(session, self.namespace, task, version)
            rows = session.scalars(query.order_by(MeasurementRow.id).limit(limit + 1)).all()
            return page(rows, limit, _record, lambda record: record.id)


def _check(measurement: Measurement) -> None:
    parse_level(measurement.served_level)
    for field in ("metric", "split"):
        value = getattr(measurement, field)
        if len(value) > 64 or not _WORD.fullmatch(value):
            message = f"{field} must be lower-case letters and digits joined by single `.`, `_`, `/` or `-`, at most 64"
            raise BadMeasurement(message, field=field)
    if not math.isfinite(measurement.value):
        raise BadMeasurement("value must be finite", field="value")
    if not is_digest(measurement.dataset):
        raise BadMeasurement("dataset must be sha256: and 64 hex digits", field="dataset")
    if measurement.served_weights is not None and not is_digest(measurement.served_weights):
        raise BadMeasurement("served_weights must be sha256: and 64 hex digits", field="served_weights")
    if measurement.scored_tokens is not None and not 0 < measurement.scored_tokens <= MAX_TOKENS:
        raise BadMeasurement(f"scored_tokens must be 1 to {MAX_TOKENS}", field="scored_tokens")
    _check_gain(measurement)


def _check_gain(measurement: Measurement) -> None:
    interval = {name: getattr(measurement, name) for name in ("gain_low", "gain", "gain_high")}
    given = {name: value for name, value in interval.items() if value is not None}
    if given and len(given) < len(interval):
        missing = next(name for name in interval if name not in given)
        raise BadMeasurement(f"{missing} is missing: a gain comes with both ends of its interval", field=missing)
    for name, value in given.items():
        if not abs(value) <= MAX_GAIN:
            message = f"{name} must be a number from -{MAX_GAIN:g} to {MAX_GAIN:g}, in nats per token"
            raise BadMeasurement(message, field=name)
    if list(given.values()) != sorted(given.values()):
        raise BadMeasurement("gain must lie between gain_low and gain_high", field="gain")


def gain_shown(session: Session, namespace: str, task: str, version: int, weights: str) -> bool:
    """Whether a measurement of this version on just these weights has the interval of its gain above 0.

    Of the measurements of one metric, data set and split the last one counts.
    """
    query = select(MeasurementRow).where(
        MeasurementRow.namespace == namespace,
        MeasurementRow.task == task,
        MeasurementRow.version == version,
        MeasurementRow.served_weights == weights,
        MeasurementRow.gain_low.is_not(None),
    )
    rows = session.scalars(query.order_by(MeasurementRow.id))
    latest = {(row.metric, row.dataset, row.split): row.gain_low or 0.0 for row in rows}
    return any(low > 0 for low in latest.values())


def _record(row: MeasurementRow) -> RecordedMeasurement:
    measurement = Measurement(
        row.metric,
        row.value,
        row.dataset,
        row.split,
        row.served_level,
        row.served_weights,
        row.scored_tokens,
        row.gain,
        row.gain_low,
        row.gain_high,
    )
    return RecordedMeasurement(row.id, row.task, row.version, measurement, row.recorded_at, row.recorded_by)
