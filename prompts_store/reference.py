"""How people name a prompt: `task`, `task@3`, `task:alias`, `task@sha256:<64 hex>`.

Knows the grammar; knows not whether anything of that name exists. Names never reach a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prompts_store.errors import BadReference

MAX_NAME = 128
_TASK = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_ALIAS = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FORMS = "`task`, `task@3`, `task:alias` or `task@sha256:<64 hex digits>`"


@dataclass(frozen=True, slots=True)
class Reference:
    """A task and at most one of version, alias, digest (`sha256:<hex>`)."""

    task: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @property
    def explicit(self) -> bool:
        """It names one prompt, whatever is served."""
        return self.version is not None or self.digest is not None

    def __str__(self) -> str:
        if self.explicit:
            return f"{self.task}@{self.digest or self.version}"
        return f"{self.task}:{self.alias}" if self.alias else self.task


def parse_reference(text: str) -> Reference:
    """Raises BadReference, saying which forms there are."""
    task, at, version = text.partition("@")
    if at:
        check_task(task)
        if is_digest(version):
            return Reference(task, digest=version)
        if _VERSION.fullmatch(version):
            return Reference(task, version=int(version))
        raise BadReference(f"{_shown(text)} is no reference: after `@` stands a version number or a digest ({_FORMS})")
    task, colon, alias = text.partition(":")
    check_task(task)
    return Reference(task, alias=check_alias(alias)) if colon else Reference(task)


def check_task(name: str) -> str:
    """The name itself. Raises BadReference."""
    if len(name) > MAX_NAME or not _TASK.fullmatch(name):
        raise BadReference(
            f"{_shown(name)} is no task name: lower-case letters and digits, joined by single `.`, `_` or `-`, "
            f"at most {MAX_NAME} characters",
            field="task",
        )
    return name


def check_alias(name: str) -> str:
    """The name itself. Raises BadReference."""
    if not _ALIAS.fullmatch(name):
        raise BadReference(
            f"{_shown(name)} is no alias: a letter, digit or `_`, then up to 127 letters, digits, `.`, `_` or `-`",
            field="alias",
        )
    return name


def is_digest(text: str) -> bool:
    """Whether this is `sha256:` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 64 else text[:64] + "…")
