"""The records in etcd, read and written behind the mesh's back by grpcio.

Not by the store of the product: what the tests say of keys and JSON is what foreign programs see.
"""

from __future__ import annotations

import queue
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from aetcd import rpc

from mm.edge.etcd_process import find_binary

CALL_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 60.0
Records = dict[str, str]


class Following:
    """What a table has, then each change: (name, value or None, whether it is a change)."""

    def __init__(self, records: Records, responses: Any, prefix: str) -> None:
        self._records = records
        self._responses = responses
        self._length = len(prefix)

    def __iter__(self) -> Iterator[tuple[str, str | None, bool]]:
        for name, value in self._records.items():
            yield name, value, False
        for response in self._responses:
            for event in response.events:
                name = event.kv.key.decode(errors="replace")[self._length :]
                is_gone = event.type == rpc.Event.EventType.DELETE
                yield name, None if is_gone else event.kv.value.decode(errors="replace"), True

    def cancel(self) -> None:
        """End it; whoever iterates is told by ``grpc.RpcError``."""
        self._responses.cancel()


class Keys:
    """One etcd as its users see it."""

    def __init__(self, endpoint: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(endpoint, options=options)
        # The stubs are written for grpc.aio and ordinary channels alike.
        self._kv: Any = rpc.KVStub(self._channel)
        self._lease: Any = rpc.LeaseStub(self._channel)
        self._watch: Any = rpc.WatchStub(self._channel)

    def put(self, key: str | bytes, value: str | bytes) -> None:
        """Write a record, whatever is there."""
        value = value.encode() if isinstance(value, str) else value
        key = key.encode() if isinstance(key, str) else key
        request = rpc.PutRequest(key=key, value=value)
        self._kv.Put(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)

    def delete(self, key: str) -> None:
        """Remove a record."""
        request = rpc.DeleteRangeRequest(key=key.encode())
        self._kv.DeleteRange(request, timeout=CALL_TIMEOUT_S)

    def get(self, key: str, revision: int = 0) -> str | None:
        """Answer a record as it is now, or was at a revision."""
        request = rpc.RangeRequest(key=key.encode(), revision=revision)
        response = self._kv.Range(request, timeout=CALL_TIMEOUT_S)
        return response.kvs[0].value.decode() if response.kvs else None

    def revision_of(self, key: str) -> int:
        """Answer the revision of the last write of a record, which is there."""
        response = self._kv.Range(rpc.RangeRequest(key=key.encode()), timeout=CALL_TIMEOUT_S)
        return int(response.kvs[0].mod_revision)

    def lease_of(self, key: str) -> int:
        """Answer the lease that a record hangs on; 0: none, or no record."""
        response = self._kv.Range(rpc.RangeRequest(key=key.encode()), timeout=CALL_TIMEOUT_S)
        return int(response.kvs[0].lease) if response.kvs else 0

    def revoke(self, lease: int) -> None:
        """End a lease as if it had run out; its records go."""
        self._lease.LeaseRevoke(rpc.LeaseRevokeRequest(ID=lease), timeout=CALL_TIMEOUT_S)

    def table(self, prefix: str) -> Records:
        """Answer the records under a prefix, by what follows it."""
        return self._read(prefix)[0]

    def versions(self, prefix: str) -> dict[str, int]:
        """Answer how many times each record under a prefix was written since it was created."""
        start, end = _range_of(prefix)
        request = rpc.RangeRequest(key=start, range_end=end, keys_only=True)
        response = self._kv.Range(request, timeout=CALL_TIMEOUT_S)
        return {kv.key.decode()[len(prefix) :]: int(kv.version) for kv in response.kvs}

    def wait(
        self,
        prefix: str,
        condition: Callable[[Records], bool],
        *,
        timeout_s: float = WAIT_TIMEOUT_S,
    ) -> Records:
        """Answer the table as soon as ``condition`` holds for it; watches, does not poll."""
        records, revision = self._read(prefix)
        requests, responses = self._open_watch(prefix, revision, timeout_s)
        try:
            while not condition(records):
                _fold(next(responses), records, len(prefix))
        except grpc.RpcError as exc:
            raise AssertionError(f"not in {timeout_s} s under {prefix}: {records}") from exc
        finally:
            requests.put(None)
            responses.cancel()
        return records

    def follow(self, prefix: str) -> Following:
        """Answer the table and all its changes, until it is cancelled."""
        records, revision = self._read(prefix)
        return Following(records, self._open_watch(prefix, revision, None)[1], prefix)

    def _open_watch(
        self, prefix: str, revision: int, timeout_s: float | None
    ) -> tuple[queue.SimpleQueue[Any], Any]:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        start, end = _range_of(prefix)
        create = rpc.WatchCreateRequest(key=start, range_end=end, start_revision=revision + 1)
        requests.put(rpc.WatchRequest(create_request=create))
        return requests, self._watch.Watch(iter(requests.get, None), timeout=timeout_s)

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def _read(self, prefix: str) -> tuple[Records, int]:
        start, end = _range_of(prefix)
        request = rpc.RangeRequest(key=start, range_end=end)
        response = self._kv.Range(request, timeout=CALL_TIMEOUT_S)
        records = {
            kv.key.decode(errors="replace")[len(prefix) :]: kv.value.decode(errors="replace")
            for kv in response.kvs
        }
        return records, response.header.revision


def run_tool(name: str, *args: str) -> str:
    """Run `etcdctl` or `etcdutl`, those beside the etcd that is used; answers what it printed."""
    command = [str(find_binary().parent / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _range_of(prefix: str) -> tuple[bytes, bytes]:
    start = prefix.encode()
    return start, start[:-1] + bytes([start[-1] + 1])


def _fold(response: Any, records: Records, prefix_length: int) -> None:
    for event in response.events:
        name = event.kv.key.decode(errors="replace")[prefix_length:]
        if event.type == rpc.Event.EventType.DELETE:
            records.pop(name, None)
        else:
            records[name] = event.kv.value.decode(errors="replace")
