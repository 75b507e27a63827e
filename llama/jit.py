"""Whether kernels in Triton run here: it comes with torch's CUDA builds, and builds its launcher with a C compiler.

Knows no kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache

log = logging.getLogger(__name__)


@cache
def compiles() -> bool:
    """Tried once; where it is there and fails, the log says why."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception:
        log.warning("Triton does not run here, so that torch's own kernels compute, slower", exc_info=True)
        return False
    return True
