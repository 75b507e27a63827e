"""From evidence to the page. Knows the order of its sections."""

from __future__ import annotations

from lab.report.claims import claims
from lab.report.evidence import Evidence
from lab.report.page import GAP, Page
from lab.report.recovery import controls_section, plain_section, recovery_section, tasks_section
from lab.report.sizes import learning_section, sizes_section
from lab.report.sources import Sources
from lab.report.transfers import transfer_section

TITLE = "Results"
TEXT = (
    "Made by `promptstitch report` from run folders and the registry; no figure was typed in. Claims are of the "
    "models named here only.",
    f"Figures are of data that nothing was learned from and nothing chosen by, unless a table says otherwise. Where "
    f"one is missing stands: {GAP}.",
)


def page_of(evidence: Evidence, original: tuple[str, int] | None = None) -> Page:
    """The page; `original`: name and bytes of the file that the dense model came from."""
    found, sources = claims(evidence), Sources()
    sections = [
        recovery_section(found, sources),
        plain_section(found, sources),
        sizes_section(evidence, found, original, sources),
        controls_section(found, evidence.of("control"), sources),
        transfer_section(evidence, sources),
        tasks_section(found, sources),
        learning_section(evidence, sources),
    ]
    return Page(TITLE, TEXT, (*sections, sources.section(evidence)))
