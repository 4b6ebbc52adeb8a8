"""Requests and answers as observers see them (around 17): payloads, and how calls are read.

Owns the reading beside the call, which neither waits for observers nor fails because of them. Where
payloads go, and what becomes of those that there is no room for, is ``mm.edge.payload_sinks``'s.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mm.core.headers import WIRE_PREFIX, HeaderList
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.messages import MessageSplitter, decompress
from mm.errors import MeshError, StatusCode


@dataclass(frozen=True, slots=True)
class Payload:
    """One message of a call; or the end of one that has no answer."""

    #: The same for request and answer, and for no other call of the cluster.
    call_id: str
    #: Counts the messages of a call, requests and answers each from 0.
    number: int
    model_id: str
    #: Empty: the client named the model itself.
    vmodel_id: str
    #: "package.Service/Method"
    method: str
    #: As it is on the wire; what was compressed is not.
    data: bytes
    headers: HeaderList
    #: None: a request, or an answer that is followed by another.
    code: int | None
    is_request: bool

    @property
    def kind(self) -> str:
        """The word that observers are told."""
        return "request" if self.is_request else "response"

    @property
    def status(self) -> str:
        """The name of the gRPC code, empty without one."""
        if self.code is None:
            return ""
        return StatusCode(self.code).name if self.code in _CODES else str(self.code)

    def metadata(self) -> dict[str, str]:
        """The headers by name; of repeated ones the last, binary ones in base64."""
        found = {}
        for name, value in self.headers:
            key = name.decode("latin-1")
            found[key] = _padded(value) if key.endswith("-bin") else value.decode("latin-1")
        return found


_CODES = frozenset(StatusCode)


def _padded(value: bytes) -> str:
    """gRPC leaves the padding out; strict readers want it."""
    last = value.rpartition(b",")[2].strip().rstrip(b"=")
    text = last + b"=" * (-len(last) % 4)
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return value.decode("latin-1")
    return text.decode("latin-1")


Tell = Callable[[Payload], None]


class Calls:
    """Numbers the calls that are observed."""

    def __init__(self, instance_id: str, started_ms: int) -> None:
        # An instance may come back under its name.
        self._prefix = f"{instance_id}-{started_ms:x}"
        self._numbers = itertools.count(1)

    def next_id(self) -> str:
        """Answer an id that no other call of the cluster has."""
        return f"{self._prefix}-{next(self._numbers)}"


class Observation:
    """Reads one call for its observers. ``tell`` never blocks.

    The last message of an answer is told with the status, so it waits for that.
    """

    __slots__ = (
        "_answer",
        "_answer_headers",
        "_answers",
        "_call_id",
        "_ended",
        "_length_max",
        "_method",
        "_model_id",
        "_request",
        "_request_encoding",
        "_request_headers",
        "_requests",
        "_response",
        "_tell",
        "_vmodel_id",
    )

    def __init__(
        self,
        incoming: IncomingCall,
        call_id: str,
        model_id: str,
        vmodel_id: str,
        length_max: int,
        tell: Tell,
    ) -> None:
        self._tell = tell
        self._call_id = call_id
        self._model_id, self._vmodel_id = model_id, vmodel_id
        self._method = incoming.method.removeprefix("/")
        self._request_headers = [
            header for header in incoming.headers if not header[0].startswith((b":", WIRE_PREFIX))
        ]
        self._request_encoding = incoming.head.encoding
        self._length_max = length_max
        #: None: what follows cannot be read.
        self._request: MessageSplitter | None = MessageSplitter("request", length_max)
        self._response: MessageSplitter | None = MessageSplitter("response", length_max)
        self._requests = self._answers = 0
        self._answer: bytes | None = None
        self._answer_headers: HeaderList = []
        self._ended = False

    # --- pieces of a call that is passed on ---------------------------------------------------

    def request_piece(self, data: bytes) -> None:
        """Some more of the request is here."""
        if self._request is None:
            return
        try:
            for compressed, message in self._request.feed(data):
                self.request(self._plain(compressed, message, self._request_encoding))
        except MeshError:
            self._request = None  # too large: the call itself is told so

    def response_headers(self, headers: HeaderList) -> None:
        """The answer begins."""
        self._answer_headers = [header for header in headers if not header[0].startswith(b":")]

    def response_piece(self, data: bytes) -> None:
        """Some more of the answer is here."""
        if self._response is None:
            return
        encoding = next((v for name, v in self._answer_headers if name == b"grpc-encoding"), b"")
        try:
            for compressed, message in self._response.feed(data):
                self.response(self._plain(compressed, message, encoding))
        except MeshError:
            self._response = None

    def _plain(self, compressed: bool, message: bytes, encoding: bytes) -> bytes:
        if not compressed:
            return message
        try:
            return decompress(message, encoding, self._length_max)
        except MeshError:
            return message  # in an encoding that cannot be read here; the headers name it

    # --- messages -----------------------------------------------------------------------------

    def request(self, message: bytes) -> None:
        """A whole message was sent."""
        headers = self._request_headers if self._requests == 0 else []
        number, self._requests = self._requests, self._requests + 1
        self._tell(self._payload(number, message, headers, None, is_request=True))

    def response(self, message: bytes) -> None:
        """A whole message was answered."""
        if self._answer is not None:
            self._answered(self._answer, None)
        self._answer = message

    @contextmanager
    def until_end(self, code: Callable[[], int | None]) -> Iterator[None]:
        """Tell the end of the call with the block's; ``code`` answers what the client was told."""
        found: int = StatusCode.INTERNAL
        try:
            yield
        except MeshError as error:
            found = error.code
            raise
        except asyncio.CancelledError:
            found = StatusCode.CANCELLED
            raise
        finally:
            told = code()
            self.end(found if told is None else told)

    def end(self, code: int) -> None:
        """The call is over; said twice, the first counts."""
        if self._ended:
            return
        self._ended = True
        answer, self._answer = self._answer, None
        self._answered(b"" if answer is None else answer, code)

    def _answered(self, message: bytes, code: int | None) -> None:
        number, self._answers = self._answers, self._answers + 1
        headers = self._answer_headers if number == 0 else []
        self._tell(self._payload(number, message, headers, code, is_request=False))

    def _payload(
        self,
        number: int,
        message: bytes,
        headers: HeaderList,
        code: int | None,
        *,
        is_request: bool,
    ) -> Payload:
        return Payload(
            self._call_id,
            number,
            self._model_id,
            self._vmodel_id,
            self._method,
            message,
            headers,
            code,
            is_request,
        )
