"""The stream on which a peer hears how busy copies here are (``mm.peer.Peer/pushLoads``).

One for each peer that calls us, opened with the first push. It carries a message a push and waits
for nothing; what it cannot send at once is not worth sending. Which peers and when is
``mesh.load_pusher``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from h2.errors import ErrorCodes

from mm.core.calls import Outcome
from mm.core.headers import HeaderList, read_status
from mm.core.ids import InstanceId, ModelId
from mm.core.load_report_wire import MalformedReportError, decode_report
from mm.edge.h2 import Channel, IncomingCall
from mm.edge.h2.messages import MessageSplitter, MessageTooLargeError, frame_message
from mm.edge.h2.stream import RawStream, StreamFault
from mm.edge.unary import request_headers
from mm.errors import InvalidRequestError, MeshError, QueueFullError
from mm.mesh.ports import PeerCallError

#: Bytes under way to a peer that reads slowly; more would only be older.
UNSENT_BYTES_MAX: Final = 64 * 1024
#: A report names the copies that one peer calls and that changed in some milliseconds.
MESSAGE_BYTES_MAX: Final = 2**20


class LoadStream:
    """The sending end. Dead once ``failure`` is set: the peer is gone, or knows no such method."""

    def __init__(self, path: str) -> None:
        self.failure: str | None = None
        #: Event loop time of the last message.
        self.used_s = 0.0
        self._path = path
        self._stream: RawStream | None = None
        self._unsent_bytes = 0

    async def open(self, channel: Channel) -> None:
        """Begin; raises ``UnreachableError``."""
        headers = request_headers(channel, self._path, None)
        self._stream = await channel.open(headers, self)

    def send(self, message: bytes, now_s: float) -> None:
        """Send a message; raises ``PeerCallError`` if the peer is behind, or does not listen."""
        assert self._stream is not None, "open() first"
        if self.failure is not None:
            raise PeerCallError(Outcome.UNREACHABLE, self.failure)
        if self._unsent_bytes > UNSENT_BYTES_MAX:
            raise PeerCallError(Outcome.UNREACHABLE, "the peer does not read")
        self.used_s = now_s
        framed = frame_message(message)
        self._unsent_bytes += len(framed)
        self._stream.send_data(framed, len(framed))

    def close(self) -> None:
        """End it; the peer need not answer."""
        if self._stream is not None:
            self._stream.reset(ErrorCodes.CANCEL)

    # --- what the stream tells: mm.edge.h2.stream.StreamSink -----------------------------------

    def headers_received(self, headers: HeaderList) -> None:
        """It may say hello."""

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """It has nothing to say before the end."""
        if self._stream is not None:
            self._stream.acknowledge(size)

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """It wants no more; an older version does not know the method."""
        status = read_status(trailers)
        self.failure = f"status {status.code}: {status.message}"
        self.close()

    def data_sent(self, size: int) -> None:
        """A message has left."""
        self._unsent_bytes -= size

    def terminated(self, fault: StreamFault) -> None:
        """It is gone."""
        self.failure = fault.text


class LoadStreamEnd:
    """The receiving end: reads in the connection's callbacks, without waking a task for each."""

    def __init__(
        self, call: IncomingCall, heard: Callable[[InstanceId, Mapping[ModelId, int]], None]
    ) -> None:
        #: Done when the sender has ended, or sent what is no report.
        self.done: asyncio.Future[None] = call.link.loop.create_future()
        self._call = call
        self._heard = heard
        self._splitter = MessageSplitter("request", MESSAGE_BYTES_MAX)
        call.read_by(self)

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Take over what whole messages say."""
        self._call.stream.acknowledge(size)
        if self.done.done():
            return
        try:
            for is_compressed, message in self._splitter.feed(data):
                if is_compressed:
                    raise InvalidRequestError("load reports are sent uncompressed")
                self._heard(*decode_report(message))
        except MessageTooLargeError as exc:
            # No setting changes this limit: the error of messages in general would name one.
            text = f"a load report has at most {MESSAGE_BYTES_MAX} bytes, this one {exc.length}"
            self.done.set_exception(QueueFullError(text))
        except MalformedReportError as exc:
            self.done.set_exception(InvalidRequestError(str(exc)))
        except MeshError as exc:
            self.done.set_exception(exc)
        else:
            if ended:
                self.done.set_result(None)

    def data_sent(self, size: int) -> None:
        """The answer is a few bytes."""
