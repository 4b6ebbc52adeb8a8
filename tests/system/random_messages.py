"""Requests by chance in which something is to be read: ids in messages, compressed or not, and what
the management API is asked. A part of ``random_calls.py``.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib

from mm.pb import mmesh

#: Methods in whose first message the id is, and where: for models, and for vmodels.
PLAIN, DEEP = b"/t.S/Extract", b"/t.S/ExtractDeep"
DATAPLANE = json.dumps(
    {
        "rpcConfigs": {
            "t.S/Extract": {"idExtractionPath": [1]},
            "t.S/ExtractDeep": {"idExtractionPath": [2, 1], "vModelId": True},
        },
        "allowOtherRpcs": True,
    }
)


def id_message(rng: random.Random, path: bytes, model_id: bytes, vmodel_id: bytes) -> bytes:
    """Answer a message that names a model by its place, most of the time."""
    right = model_id if path == PLAIN else vmodel_id
    ids = [rng.choice((right, right, right, b"unknown", b"", b"\xff", b"x" * 5000))]
    if rng.random() < 0.3:
        ids.insert(0, rng.choice((b"unknown", right)))  # the last one counts
    fields = [_field(1, each) if path == PLAIN else _field(2, _inner(rng, each)) for each in ids]
    noise = [
        _field(7, rng.randbytes(rng.choice((0, 3, 300, 40_000)))),
        b"\x18\x96\x01",  # 3: 150
        b"\x25\1\2\3\4",  # 4: a fixed32
        b"\x29\1\2\3\4\5\6\7\x08",  # 5: a fixed64
        b"\x33\x08\x01\x34",  # 6: a group
    ]
    odd = (
        b"\x08\x01",  # 1: a number
        b"\x0a\x7f",  # 1: longer than there is
        b"\xff",
        b"\x00",
        b"\x0b\x0c",  # 1: a group
    )
    fields += rng.sample(noise, rng.choice((0, 0, 1, 2)))
    if rng.random() < 0.2:
        fields.append(rng.choice(odd))
    rng.shuffle(fields)
    return b"".join(fields)


def compressed(rng: random.Random, message: bytes) -> tuple[bytes, bytes]:
    """Answer what grpc-encoding says, and a message that is compressed so, or claims it."""
    encoding = rng.choice((b"gzip", b"gzip", b"deflate", b"snappy", b"identity"))
    body = gzip.compress(message, mtime=0) if encoding == b"gzip" else zlib.compress(message)
    if rng.random() < 0.1:
        body = body[:-3]
    flag = b"\0" if rng.random() < 0.1 else b"\1"
    return encoding, flag + len(body).to_bytes(4) + body


def management(rng: random.Random) -> tuple[bytes, bytes]:
    """Answer a path and a message of the management API that changes nothing that lasts."""
    name, message = rng.choice(
        (
            ("ModelMesh/getModelStatus", mmesh.GetStatusRequest(model_id="unknown")),
            ("ModelMesh/getModelStatus", mmesh.GetStatusRequest()),
            ("ModelMesh/ensureLoaded", mmesh.EnsureLoadedRequest(model_id="unknown")),
            ("ModelMesh/unregisterModel", mmesh.UnregisterModelRequest(model_id="unknown")),
            ("ModelMesh/registerModel", mmesh.RegisterModelRequest(model_id="new")),
            ("ModelMesh/registerModel", mmesh.RegisterModelRequest(model_id="x" * 5000)),
            ("ModelMesh/getVModelStatus", mmesh.GetVModelStatusRequest(v_model_id="unknown")),
            ("ModelMesh/deleteVModel", mmesh.DeleteVModelRequest(v_model_id="unknown")),
            ("ModelMesh/setVModel", mmesh.SetVModelRequest(v_model_id="w")),
        )
    )
    body = bytes(message)
    if rng.random() < 0.2:
        body += rng.choice((b"\xff", b"\x0a\x7f", b"\x9a\x06\x01x"))
    return b"/mmesh." + name.encode(), body


def _inner(rng: random.Random, value: bytes) -> bytes:
    return rng.choice((b"", b"\x10\x05")) + _field(1, value)


def _field(number: int, value: bytes) -> bytes:
    length, size = b"", len(value)
    while size > 0x7F:
        length += bytes((size & 0x7F | 0x80,))
        size >>= 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + value
