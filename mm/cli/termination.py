"""Why an instance ended, where Kubernetes looks for it: the termination message (around 1.4).

Owns the text and the file. `kubectl describe pod` shows it as the message of the container's last
state. Nothing is written when an instance was told to stop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mm.cli.errors import expected_error
from mm.errors import ConfigError

logger = logging.getLogger(__name__)

#: Kubelet makes it, writable for everybody, in each container; nobody else has one.
KUBERNETES_PATH: Final = Path("/dev/termination-log")
#: Kubelet reads no more of it.
MESSAGE_BYTES_MAX: Final = 4096


def leave_message(error: Exception, environment: Mapping[str, str], *, has_started: bool) -> None:
    """Write why this instance ends; a file that cannot be written changes nothing about that."""
    path = message_path(environment)
    if path is None:
        return
    text = message_of(error, has_started=has_started)
    try:
        # Appended, as the Java mesh does: a wrapper may have written before us.
        with path.open("ab") as file:
            file.write(f"{text}\n".encode()[:MESSAGE_BYTES_MAX])
    except OSError as exc:
        logger.warning("no termination message: %s", exc)


def message_path(environment: Mapping[str, str]) -> Path | None:
    """Answer the file; None: nobody would read it."""
    chosen = environment.get("LL_TERMINATION_MSG_PATH", "").strip()
    if chosen:
        return Path(chosen)
    if "KUBERNETES_SERVICE_HOST" in environment and KUBERNETES_PATH.exists():
        return KUBERNETES_PATH
    return None


def message_of(error: BaseException, *, has_started: bool) -> str:
    """Answer one line in the words of the Java mesh's launcher."""
    when = "Service failed post-startup" if has_started else "Service startup failed"
    expected = expected_error(error)
    if isinstance(expected, ConfigError):
        text = "; ".join(expected.complaints)
    elif expected is not None:
        text = str(expected)
    else:
        while isinstance(error, BaseExceptionGroup):
            # The first that is a bug: what else is in a group was cancelled by it.
            bugs = [each for each in error.exceptions if expected_error(each) is None]
            error = bugs[0]
        text = f"{type(error).__name__}: {error}"
    return " ".join(f"{when}: {text}".split())
