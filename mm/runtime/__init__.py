"""For people who write model runtimes: a base class, and the gRPC server under it.

``base.py`` shows a complete runtime. Ready-made: ``sklearn.py`` (``mm runtime sklearn``).
"""

from __future__ import annotations

from mm.errors import StatusCode
from mm.runtime.base import ModelRuntime, serves
from mm.runtime.call import CallError
from mm.runtime.process import run_runtime

__all__ = ["CallError", "ModelRuntime", "StatusCode", "run_runtime", "serves"]
