"""A connection that is lost between being made and its first call, told as what it is.

Owns the translation of one exception of grpclib's: whoever is killed leaves connections that its
system has accepted and takes back at once, and grpclib then reads an attribute that it deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from grpclib.protocol import Connection


@contextmanager
def told_as_errors() -> Iterator[None]:
    """Raise ``ConnectionError`` in its place: nothing of the call was sent."""
    try:
        yield
    except AttributeError as exc:
        if not isinstance(exc.obj, Connection):
            raise
        raise ConnectionError("the connection was lost before the call") from exc
