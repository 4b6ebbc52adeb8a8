"""A real etcd with users: it is started, given them, and has their passwords changed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aetcd.rpc as rpc
import anyio

from mm.edge.etcd_process import EtcdProcess, find_binary


@contextmanager
def etcd_with_users(
    password: str,
    names: Sequence[str] = ("root",),
    *,
    guest_keys: tuple[bytes, bytes] | None = None,
) -> Iterator[EtcdProcess]:
    """Run an etcd that takes nobody but these users, each with a role of the same name.

    ``guest_keys`` are what the role "guest" may read and write, from and to; "root" may do all.
    """
    with tempfile.TemporaryDirectory(prefix="mm-test-etcd-") as directory:
        etcd = EtcdProcess(find_binary(), Path(directory), ["--bcrypt-cost=4"])
        try:
            etcd.start()
            anyio.run(_enable_users, etcd, password, names, guest_keys)
            yield etcd
        finally:
            etcd.stop()


async def _enable_users(
    etcd: EtcdProcess,
    password: str,
    names: Sequence[str],
    guest_keys: tuple[bytes, bytes] | None,
) -> None:
    channel = rpc.insecure_channel(str(etcd.endpoint))
    auth = rpc.AuthStub(channel)
    for name in names:
        await auth.UserAdd(rpc.AuthUserAddRequest(name=name, password=password))
        await auth.RoleAdd(rpc.AuthRoleAddRequest(name=name))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=name))
    if guest_keys is not None:
        permission = rpc.Permission(
            permType=rpc.Permission.READWRITE, key=guest_keys[0], range_end=guest_keys[1]
        )
        await auth.RoleGrantPermission(
            rpc.AuthRoleGrantPermissionRequest(name="guest", perm=permission)
        )
    await auth.AuthEnable(rpc.AuthEnableRequest())
    await channel.close()


async def change_password(etcd: EtcdProcess, user: str, *, root: str, new: str) -> None:
    """Set a user's password, as root with the password ``root``: etcd then forgets all of the
    user's tokens, also if it is the same one again.
    """
    channel = rpc.insecure_channel(str(etcd.endpoint))
    auth = rpc.AuthStub(channel)
    login = await auth.Authenticate(rpc.AuthenticateRequest(name="root", password=root))
    request = rpc.AuthUserChangePasswordRequest(name=user, password=new)
    await auth.UserChangePassword(request, metadata=(("token", login.token),))
    await channel.close()
