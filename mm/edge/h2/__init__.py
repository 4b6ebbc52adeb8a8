"""gRPC transport on grpclib's protocol layer, in raw bytes: both ends, any kind of call.

    server = GrpcServer(handler, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    channel = Channel("127.0.0.1:8085", RUNTIME_LIMITS)
    stream = await channel.open(headers, sink)

grpclib's own server and client streams stand in the way of a proxy: they fail on compressed
messages, foreign content-subtypes, empty, repeated and non-ASCII metadata, bad base64, header
lists and messages above a limit, more than 100 streams, and on a GOAWAY with calls in flight.
"""

from mm.edge.h2.client import Channel, ChannelFullError, ChannelPool, UnreachableError
from mm.edge.h2.incoming import Body, IncomingCall
from mm.edge.h2.limits import (
    EXTERNAL_LIMITS,
    PEER_LIMITS,
    RUNTIME_LIMITS,
    SERVING_LIMITS,
    TransportLimits,
)
from mm.edge.h2.server import GrpcServer, Handler
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault, StreamSink

__all__ = [
    "EXTERNAL_LIMITS",
    "PEER_LIMITS",
    "RUNTIME_LIMITS",
    "SERVING_LIMITS",
    "Body",
    "Channel",
    "ChannelFullError",
    "ChannelPool",
    "FaultKind",
    "GrpcServer",
    "Handler",
    "IncomingCall",
    "RawStream",
    "StreamFault",
    "StreamSink",
    "TransportLimits",
    "UnreachableError",
]
