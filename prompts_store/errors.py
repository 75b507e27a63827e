"""What the registry refuses, and why: one tree, no HTTP.

    StoreError
    ├── InvalidArtifact        an uploaded file is not an acceptable soft prompt
    ├── BadReference           a task, alias or reference that does not parse
    ├── BadLevel               a compression level that is not written canonically
    ├── BadMeasurement         a measurement whose numbers or names are out of bounds
    ├── BadKey                 an API key asked for with an unknown scope or without a name
    ├── NotFound               no such task, version, alias, prompt or key
    │   └── Unresolved         the task is known, but nothing fits the served model under this policy
    ├── Gone                   the version was deleted; its number is never used again
    ├── Conflict               the request contradicts what is stored
    │   └── WrongBase          the version belongs to another base model
    ├── PreconditionRequired   an alias may move only against its revision
    ├── PreconditionFailed     that revision is stale
    ├── CorruptBlob            stored bytes are not what their digest says; never served
    ├── GoldenMismatch         a stored prompt fails its self-test on the served weights; not served
    ├── StorageFull            the disk takes no more bytes
    ├── StoreLocked            another process holds the store
    └── SchemaTooNew           the database was written by a newer release

Every error has a stable `code`, a `message` that says what to do, and `field`: the input that is wrong, or None.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of an OSError: the disk takes no more bytes


class StoreError(Exception):
    """Base of everything that this package raises on purpose."""

    code = "store_error"

    def __init__(self, message: str, *, code: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code


class InvalidArtifact(StoreError):
    """An uploaded file is refused; nothing of it is kept."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message, code=code, field=field)


class BadReference(StoreError):
    """A name or reference is not of the grammar in `reference.py`."""

    code = "invalid_reference"


class BadLevel(StoreError):
    """A level is unknown (`canonical` is None) or not written canonically (`canonical` is how to write it)."""

    code = "invalid_level"

    def __init__(self, message: str, canonical: str | None = None) -> None:
        super().__init__(message, field="level")
        self.canonical = canonical


class BadMeasurement(StoreError):
    """A measurement is out of bounds; `field` names which value."""

    code = "invalid_measurement"


class BadKey(StoreError):
    """An API key cannot be made as asked; `field` names why."""

    code = "invalid_key"


class NotFound(StoreError):
    """`what` is one of task, version, alias, prompt, key."""

    def __init__(self, what: str, message: str, code: str | None = None) -> None:
        super().__init__(message, code=code or f"{what}_not_found")
        self.what = what


class Unresolved(NotFound):
    """The task is known; `levels` are those that it has for the served base, `served_level` is the wanted one."""

    def __init__(self, message: str, served_level: str, levels: Sequence[str]) -> None:
        super().__init__("prompt", message, "prompt_unresolved")
        self.served_level = served_level
        self.levels = tuple(levels)


class Gone(StoreError):
    """A tombstone."""

    code = "version_deleted"


class Conflict(StoreError):
    """`code` says what contradicts."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, code=code)


class WrongBase(Conflict):
    """An explicit reference to a version of another base model."""

    def __init__(self, message: str) -> None:
        super().__init__("base_model_mismatch", message)


class PreconditionRequired(StoreError):
    """Moving an alias needs the revision it is moved from."""

    code = "precondition_required"


class PreconditionFailed(StoreError):
    """The alias has changed, or does not exist, since the revision was read."""

    code = "precondition_failed"


class CorruptBlob(StoreError):
    """The bytes of `digest` are damaged or missing. They are set aside; uploading the prompt again heals it."""

    code = "corrupt_blob"

    def __init__(self, digest: str, why: str) -> None:
        super().__init__(f"the stored bytes of {digest} {why}; they are not served. Upload the prompt again.")
        self.digest = digest
        self.why = why


class GoldenMismatch(StoreError):
    """What is served does not compute what the version's golden self-test expects of its weights."""

    code = "golden_mismatch"


class StorageFull(StoreError):
    """Disk full, read-only or failing: nothing was written."""

    code = "storage_full"


class StoreLocked(StoreError):
    """One process at a time holds a local store."""

    code = "store_locked"


class SchemaTooNew(StoreError):
    """The database knows a schema that this release does not."""

    code = "schema_too_new"
