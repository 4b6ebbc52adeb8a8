"""What clients are told of calls that moved bytes did not get an answer for: one text, both planes.

Owns the words that the wire says, too, which cannot ask for any: it reads them when it is imported,
as formats of C. So only ``%s``, ``%d`` and ``%g`` may stand in them. What the mesh decides has its
words where it decides.
"""

from __future__ import annotations

from typing import Final

#: Of a runtime: the instance beside it, and why there is no answer.
RUNTIME_SILENT: Final = "the model runtime of instance %s does not answer: %s"
#: The same of another instance.
INSTANCE_GONE: Final = "instance %s is gone: %s"
#: An address, and the system's word for it.
NOT_CONNECTED: Final = "cannot connect to %s: %s"
#: An address, and seconds.
NO_ANSWER: Final = "no answer from %s in %g s"
NO_HTTP2: Final = "%s closed the connection before it spoke HTTP/2"
#: An address, and OpenSSL's word for it.
NO_TLS: Final = "no TLS with %s: %s"
#: In place of an address: the server of an instance's own services, to which the wire gives calls.
OWN_SERVER: Final = "this instance"
CONNECTION_LOST: Final = "connection to %s lost"
#: It did not look at the call before it said GOAWAY.
CONNECTION_CLOSING: Final = "%s is closing the connection"
STREAM_REFUSED: Final = "stream refused (REFUSED_STREAM)"
#: The name of a code of HTTP/2.
STREAM_RESET: Final = "stream reset (%s)"
UPSTREAM_ENDED: Final = "the upstream ended the call: %s"
#: Some header, or the order of frames, is not as HTTP/2 has it.
MALFORMED_RESPONSE: Final = "malformed response"
NO_STATUS: Final = "the response ended without a status"
#: "request" or "response", bytes, and bytes.
MESSAGE_TOO_LONG: Final = (
    "%s message of %d bytes exceeds the limit of %d bytes (MM_SVC_GRPC_MAX_MSG_SIZE)"
)
#: "request" or "response".
MESSAGE_FLAG: Final = "%s message with a flag that is neither 0 nor 1"
MESSAGE_CUT_OFF: Final = "the request message is cut off"
#: What grpc-encoding says.
UNREADABLE_ENCODING: Final = "compression %s cannot be read here; use gzip or deflate"
DEADLINE_EXCEEDED: Final = "deadline exceeded"
SHUTTING_DOWN: Final = "the server is shutting down"
#: The value of grpc-accept-encoding beside the last but two: what can be read here.
ENCODINGS_READ: Final = "identity,gzip,deflate"
