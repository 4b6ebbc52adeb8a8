"""`mm serve` for whom some things happen sooner: ``python -m tests.system.quick_serve JSON``.

The JSON names limits (``lease_ttl_s``) and constants (``mm.mesh.filler.LOST_AFTER_S``) that no
setting changes, so that a test need not wait for what takes minutes.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from typing import Any, Final

from mm.cli.serve import serve
from mm.config import Config

#: For an outage of a minute in a quarter of one: what has to do with it takes a quarter, too.
FOUR_TIMES: Final[dict[str, Any]] = {
    "lease_ttl_s": 5,
    "store_silence_max_s": 2.5,
    "restore_wait_s": 0.5,
    "restore_grace_s": 3.75,
}


def main() -> None:
    """Be `mm serve`."""
    limits = {}
    for name, value in json.loads(sys.argv[1]).items():
        module, _, constant = name.rpartition(".")
        if module:
            assert hasattr(importlib.import_module(module), constant), name
            setattr(importlib.import_module(module), constant, value)
        else:
            limits[name] = value
    from_environment = Config.from_environment
    Config.from_environment = staticmethod(  # type: ignore[method-assign]
        lambda environment: replace(from_environment(environment), **limits)
    )
    serve()


if __name__ == "__main__":
    main()
