"""Memory that was freed and that the C library keeps for itself.

glibc returns freed pieces of up to 32 MiB only from the end of its heap; pieces that come and go while layers are built
between them stay, a sixth of the model's size in all.
"""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give freed memory back to the system; does nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
