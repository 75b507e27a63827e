"""Tables of what models weigh, what learning cost, and how it went. Knows records; knows no model."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.errors import RunError
from lab.report.claims import Claim, made_by
from lab.report.evidence import Evidence, Record
from lab.report.page import GAP, Section, Table, megabytes, number, short
from lab.report.sources import Sources

TEXT = (
    "Bytes on disk count everything in the weights' files: scales, masks, embeddings, norms. Resident bytes are those "
    "of all tensors as they are served. The paper counts the codes of what is kept of the linear layers, and no more. "
    "The dense file may hold 32 bits a weight, and the original 4: the ratios to both stand side by side."
)
SIZES = (
    "model",
    "level",
    "method",
    "disk, MB",
    "resident, MB",
    "paper's count, MB",
    "of the original's bytes",
    "dense file / this one",
    "16-bit linears / paper's count",
    "source",
)
RUNS = (
    *("kind", "task", "level", "seed", "recipe", "parameters", "steps", "tokens", "seconds", "tokens/s"),
    *("loss at first", "loss at best", "divergence at first", "at best", "source"),
)


_RATIOS = (("dense_disk", "disk"), ("paper_dense", "paper"))


def original_bytes(file: Path) -> int:
    """Bytes of a model's original file, or of the one `.gguf` inside a wheel. Raises RunError."""
    try:
        if file.suffix != ".whl":
            return file.stat().st_size
        with zipfile.ZipFile(file) as wheel:
            sizes = [each.file_size for each in wheel.infolist() if each.filename.endswith(".gguf")]
    except (OSError, zipfile.BadZipFile) as error:
        raise RunError(f"--original {file} cannot be read ({error}); name the file that the model came from") from error
    if len(sizes) != 1:
        raise RunError(f"--original {file} holds {len(sizes)} .gguf files; name one that holds one")
    return sizes[0]


def sizes_section(
    evidence: Evidence, found: Sequence[Claim], original: tuple[str, int] | None, sources: Sources
) -> Section:
    """The original, the dense model, and each compressed one."""
    name, size = original or ("original file (--original FILE)", None)
    rows = [[name, "as published", "-", megabytes(size), *[GAP] * 5, "-"]]
    made = evidence.of("compress")
    for record in made[:1]:
        told = record.figures
        dense, paper = told.get("dense_disk_bytes"), told.get("paper_dense_bytes")
        who = f"{told.get('name', GAP)} {short(record.config.get('source'))}"
        sizes = [megabytes(dense), GAP, megabytes(paper)]
        rows.append([who, "dense", "-", *sizes, _ratio(dense, size), "1", "1", sources.cite(record)])
    for record in sorted(made, key=lambda each: (each.figures.get("disk_bytes") or 0, each.name)):
        rows.append(_compressed(record, size, sources))
    known = {record.figures.get("weights") for record in made}
    for claim in {str(c.told.get("weights")): c for c in found if c.told.get("weights") not in known}.values():
        sizes = [megabytes(each) for each in (claim.disk_bytes, claim.told.get("bytes"))]
        source = sources.cite(claim.record)
        model = f"{claim.told.get('model')} {short(claim.told.get('weights'))}"
        ratio = _ratio(claim.disk_bytes, size)
        rows.append([model, claim.level, claim.method, *sizes, GAP, ratio, GAP, GAP, source])
    return Section("Sizes", (TEXT,), (Table("What models weigh", SIZES, rows),))


def learning_section(evidence: Evidence, sources: Sources) -> Section:
    """Every run of learning, controls among them: what it cost, and its losses on the data that it selects by."""
    rows = [_learned(record, sources) for record in evidence.of("learn")]
    text = "Losses are of the selection data, before the first step and at the step that was kept: they report nothing."
    return Section("Learning", (text,), (Table("All runs", RUNS, rows),))


def _compressed(record: Record, original: int | None, sources: Sources) -> list[str]:
    told = record.figures
    sizes = [megabytes(told.get(f"{field}_bytes")) for field in ("disk", "resident", "paper")]
    ratios = [_ratio(told.get("disk_bytes"), original)]
    ratios += [_ratio(told.get(f"{dense}_bytes"), told.get(f"{own}_bytes")) for dense, own in _RATIOS]
    return [_name(record), str(told.get("level")), made_by(told), *sizes, *ratios, sources.cite(record)]


def _ratio(one: float | None, other: float | None) -> str:
    return GAP if one is None or not other else f"{one / other:.2f}"


def _name(record: Record) -> str:
    return f"{record.figures.get('name', GAP)} {short(record.figures.get('weights'))}"


def _learned(record: Record, sources: Sources) -> list[str]:
    told, recipe = record.figures, dict(record.config.get("recipe") or {})
    how = ", ".join(
        f"{name} {recipe[name]}" for name in ("positions", "lr", "distil", "batch", "window") if name in recipe
    )
    counts = [_count(told.get(name)) for name in ("parameters", "steps", "tokens", "seconds", "tokens_per_second")]
    ends = [dict(told.get(name) or {}) for name in ("first", "best")]
    losses = [number(end.get(name), ".4f") for name in ("cross_entropy", "divergence") for end in ends]
    where = [str(told.get("kind")), str(told.get("task") or "-"), str(told.get("level")), str(record.seed)]
    return [*where, how, *counts, *losses, sources.cite(record)]


def _count(value: Any) -> str:
    return GAP if value is None else f"{value:,}"
