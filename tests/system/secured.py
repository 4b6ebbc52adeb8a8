"""What tests of TLS between real processes have in common: who is who, and how they connect."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from functools import partial
from typing import Final

import grpc

from tests.identities import SERVERS, Identity, make, make_authority
from tests.system.meshes import channel_to, refusal

#: Ends what hangs.
WAIT_S: Final = 30.0


def credentials(
    trust: Identity, own: Identity | None = None, *chain: Identity
) -> grpc.ChannelCredentials:
    """What a grpcio client trusts and shows."""
    if own is None:
        return grpc.ssl_channel_credentials(trust.certificate_pem)
    shown = b"".join(each.certificate_pem for each in (own, *chain))
    return grpc.ssl_channel_credentials(trust.certificate_pem, own.key_pem(), shown)


@dataclass(frozen=True, slots=True)
class World:
    """An authority, whom it signed, and who signed itself."""

    authority: Identity
    server: Identity
    client: Identity
    stranger: Identity


def make_world() -> World:
    """Answer new ones."""
    authority = make_authority()
    return World(
        authority,
        # Not for clients: the controller shows it all the same.
        make("server", authority, usage=SERVERS),
        make("client", authority),
        make("stranger"),
    )


def ask(port: int, with_credentials: grpc.ChannelCredentials | None) -> str:
    """Call with these; answers the code of a call for a model that there is not."""
    with channel_to(port, credentials=with_credentials) as channel:
        call = channel.unary_unary("/mmesh.ExamplePredictor/predict")
        metadata = (("mm-model-id", "none"),)
        return refusal(partial(call, b"", metadata=metadata, timeout=WAIT_S))[0].name


def client_context(trust: Identity, own: dict[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=trust.certificate_pem.decode())
    if own:
        context.load_cert_chain(own["MM_TLS_KEY_CERT_PATH"], own["MM_TLS_PRIVATE_KEY_PATH"])
    return context


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
