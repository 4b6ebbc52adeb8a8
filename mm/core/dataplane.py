"""Which methods are served, and where in a request the model's id stands (around 7.1).

The values and the parser; finding an id in a message is the protobuf id paths' affair. Without any
configuration every method is served and ids come from headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from mm.core.json_input import check_said_once, decode_entries, decode_json

#: Field numbers of protobuf are 29 bits wide.
FIELD_NUMBER_MAX = 2**29 - 1
#: No parser of protobuf goes deeper into a message.
PATH_LENGTH_MAX = 100


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """What is special about one method. An empty path: its ids come from headers."""

    id_extraction_path: tuple[int, ...] = ()
    #: The extracted id names a vmodel. Headers may say either whatever this says.
    is_vmodel_id: bool = False


@dataclass(frozen=True, slots=True)
class DataplaneConfig:
    """The allow-list. ``rpcs`` is keyed by "package.Service/Method", no slash before it."""

    rpcs: Mapping[str, RpcConfig] = field(default_factory=lambda: MappingProxyType({}))
    allow_other_rpcs: bool = True
    #: What is allowed, and most likely not meant: for the log.
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def rpc(self, method: str) -> RpcConfig | None:
        """Answer how to treat "/package.Service/Method"; None when it is not served."""
        found = self.rpcs.get(method.removeprefix("/"))
        if found is None and self.allow_other_rpcs:
            return _FROM_HEADERS
        return found


_FROM_HEADERS = RpcConfig()


class _RpcJson(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    id_extraction_path: tuple[int, ...] | None = None
    # Not camel case as the rule makes it: the attribute is spelt "vModelId".
    vmodel_id: bool = msgspec.field(default=False, name="vModelId")


class _ConfigJson(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    rpc_configs: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)
    # A configuration that says nothing of other methods denies them: "{}" denies everything.
    allow_other_rpcs: bool = False


def parse_dataplane_config(text: str | bytes) -> DataplaneConfig:
    """Read the JSON of the Java mesh; raises ``ValueError`` that names what is wrong with it.

    Strict: an unknown property is an error, because a misspelt one would open or close methods, and
    so is a method that is there twice, of which only one entry would hold.
    """
    raw = decode_json(text, _ConfigJson)
    entries = decode_entries(raw.rpc_configs, _RpcJson)
    check_said_once(text)
    rpcs, remarks = {}, []
    for method, rpc in entries.items():
        service, _, name = method.partition("/")
        if not service or not name or "/" in name:
            raise ValueError(f'"{method}" is not of the form "package.Service/Method"')
        path = rpc.id_extraction_path or ()
        if len(path) > PATH_LENGTH_MAX:
            raise ValueError(f'"{method}": a path has at most {PATH_LENGTH_MAX} field numbers')
        for number in path:
            if not 1 <= number <= FIELD_NUMBER_MAX:
                raise ValueError(f'"{method}": {number} is not a protobuf field number')
        if not path and rpc.vmodel_id:
            remarks.append(f'"{method}": vModelId means nothing without an idExtractionPath')
        elif rpc.id_extraction_path == ():
            remarks.append(f'"{method}": idExtractionPath is empty, so ids come from headers')
        rpcs[method] = RpcConfig(id_extraction_path=path, is_vmodel_id=rpc.vmodel_id)
    return DataplaneConfig(
        rpcs=MappingProxyType(rpcs),
        allow_other_rpcs=raw.allow_other_rpcs,
        remarks=tuple(remarks),
    )
