"""Builds the image without a container runtime, and starts it as a pod would: `make test-image`.

Not a part of the suite: it takes minutes, root, debootstrap and the network. The Dockerfile is
carried out in clean root directories (``dockerfile``). What comes out is started from its own entry
point, as process 1 of namespaces of its own, in its own root, where nothing may be written but what
a pod mounts, as user 1000 and then as one whom OpenShift would choose. What is seen of it is what
kubelet, the controller and clients see.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from mm.demo.processes import environment as without_settings
from mm.edge.embedded_etcd import embedded_etcd
from tests.pod import tables
from tests.pod.adapter import serving
from tests.pod.controller_calls import Service, infer
from tests.pod.dockerfile import Build, Stage, debian_base, size_bytes
from tests.pod.pods import ROOT, Cluster, Pod
from tests.system.etcd import Keys
from tests.system.processes import Program, eventually

_BUILD: Final = ROOT / "build" / "image"
SIZE_MAX_BYTES: Final = 250_000_000
#: User and group: one of nobody's, and a random one in group 0.
USERS: Final = ((1000, 1000), (1_000_680_000, 0))
_WAIT_S: Final = 60.0

#: What a container runtime does before the entry point, with {places} as a pod mounts them.
_ENTER: Final = """
mount --bind {root} {root}
mount -t proc proc {root}/proc
mount -t tmpfs -o mode=0755 tmpfs {root}/dev
for each in null zero urandom random; do
    touch {root}/dev/$each && mount --bind /dev/$each {root}/dev/$each
done
touch {root}/dev/termination-log
mount --bind {pod}/termination-log {root}/dev/termination-log
for each in {places}; do
    mount --bind {pod}/${{each%%=*}} {root}${{each#*=}}
done
mount -o remount,bind,ro {root}/dev
mount -o remount,bind,ro {root}
exec chroot {root} {become} /bin/sh -c 'cd "$0" && exec "$@"' {entry}
"""


class Container:
    """The container `mm` of a pod, made of the image."""

    def __init__(self, pod: Pod, image: Stage, uid: int, gid: int) -> None:
        self.pod = pod
        self._image = image
        rights = "--clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
        self._become = f"setpriv --reuid {uid} --regid {gid} {rights}"
        self._places = {
            "config": tables.CONFIG_DIRECTORY,
            "etcd": tables.ETCD_DIRECTORY,
            "sockets": "/models",
        }

    def start(self) -> None:
        """Start it."""
        root = self._image.root
        for place in self._places.values():
            # The container runtime makes these.
            (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        script = _ENTER.format(
            root=shlex.quote(str(root)),
            pod=shlex.quote(str(self.pod.directory)),
            places=" ".join(f"{name}={place}" for name, place in self._places.items()),
            become=self._become,
            entry=shlex.join([self._image.working_directory, *self._image.entry_point]),
        )
        values = {
            "pod_name": self.pod.name,
            "pod_ip": self.pod.ip,
            "host_ip": "192.0.2.1",
            "labels": ",".join(self.pod.runtime.labels),
            "etcd_directory": tables.ETCD_DIRECTORY,
            "config_directory": tables.CONFIG_DIRECTORY,
            "management_socket": "/models/adapter.sock",
            "data_socket": "/models/server.sock",
        }
        own = {
            **self._image.environment,
            **tables.environment(values),
            # Several pods on one machine: else it would be every address.
            "MM_BIND_HOST": self.pod.ip,
            "HOME": "/",
        }
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**without_settings({}), **own},
        )
        self.pod.mm = Program(self.pod.name, process)
        self.pod.closing(self._kill)

    def _kill(self) -> None:
        """End it before what started it: with the new user the kernel forgets to do it."""
        with suppress(OSError, IndexError):
            os.kill(self.pid, signal.SIGKILL)

    @property
    def pid(self) -> int:
        """Process 1 of the container, by its number outside."""
        outer = self.pod.program.process.pid
        text = Path(f"/proc/{outer}/task/{outer}/children").read_text(encoding="ascii")
        return int(text.split()[0])

    def execute(self, *command: str) -> subprocess.Popen[str]:
        """Run something in it, as kubelet runs a hook."""
        entered = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd"]
        return subprocess.Popen(
            [*entered, *self._become.split(), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def start_pod(cluster: Cluster, image: Stage, number: int, uid: int, gid: int) -> Container:
    """Start a pod with a runtime beside the image."""
    directory = Path(tempfile.mkdtemp(prefix="mm-image-pod-"))
    name = f"{tables.SERVICE_NAME}-{tables.MLSERVER.name}-5d8f7b9c64-q7x2{number}"
    pod = Pod(name, f"{cluster.network}.{number}", tables.MLSERVER, directory)
    cluster.pods.append(pod)
    pod.closing(partial(shutil.rmtree, directory, ignore_errors=True))
    secret = tables.etcd_secret(cluster.endpoint, cluster.root_prefix)
    pod.mount("etcd", {"etcd_connection": secret})
    pod.mount("config", cluster.config_map())
    sockets = directory / "sockets"
    places = [sockets / each for each in ("adapter.sock", "server.sock")]
    pod.enter(serving(pod.adapter, *(f"unix:{place}" for place in places)))
    for place in places:
        place.chmod(0o777)
    container = Container(pod, image, uid, gid)
    container.start()
    return container


def check_pods(image: Stage, endpoint: str) -> None:
    """Have two pods of the image serve, and one of them end."""
    with ExitStack() as stack:
        keys = Keys(endpoint)
        stack.callback(keys.close)
        cluster = Cluster(endpoint, keys, 1)
        stack.callback(cluster.close)
        cluster.runtimes = [tables.MLSERVER]
        containers = [
            start_pod(cluster, image, number, uid, gid)
            for number, (uid, gid) in enumerate(USERS, start=2)
        ]
        cluster.wait_ready()
        service = Service.of(cluster, "from-the-image")
        service.bring_up()
        for container, (uid, _) in zip(containers, USERS, strict=True):
            assert infer(container.pod, service.name)[0] == service.model_id
            assert container.pod.probe(tables.LIVENESS) == 200
            say_health(container, image)
            say_process(container, uid)
        end_one(containers[0], containers[1], service)


def say_process(container: Container, uid: int) -> None:
    """Look at process 1, and try to write."""
    text = Path(f"/proc/{container.pid}/status").read_text(encoding="ascii")
    status = {
        name: value.split() for name, _, value in (s.partition(":") for s in text.splitlines())
    }
    assert status["NSpid"][-1] == "1"
    assert set(status["Uid"]) == {str(uid)}
    assert all(set(status[name][0]) == {"0"} for name in status if name.startswith("Cap"))
    for place in ("/tmp/x", "/opt/mm/x", "/opt/kserve/mmesh/x", "/dev/x"):
        tried = container.execute("touch", place)
        said, _ = tried.communicate(timeout=_WAIT_S)
        assert tried.returncode != 0, place
        assert "Read-only file system" in said, said
    used = int(status["VmHWM"][0]) / 1024
    assert used * 2**20 < tables.MEMORY_LIMIT_BYTES / 2
    print(f"user {uid}: process 1, no capability, nothing can be written, {used:.0f} MiB")


def say_health(container: Container, image: Stage) -> None:
    """Run the health check as Docker would, with the container's variables and without."""
    listens = f"MM_BIND_HOST={container.pod.ip}"
    for variables, code in (([listens], 0), ([listens, "MM_PROBE_PORT=8088"], 1)):
        ran = container.execute("env", *variables, *image.health)
        said, _ = ran.communicate(timeout=_WAIT_S)
        assert ran.returncode == code, said
    print("health check: 0 while it serves, 1 where nobody listens")


def end_one(goes: Container, stays: Container, service: Service) -> None:
    """Kubelet's order: all hooks, which wait; then the process has ended."""
    hook = threading.Thread(target=goes.pod.probe, args=(tables.PRESTOP,))
    hook.start()
    eventually(lambda: "waits at /prestop" in goes.pod.program.output(), what="the hook waits")
    stop = goes.execute(*tables.STOP_COMMAND)
    said, _ = stop.communicate(timeout=2 * tables.GRACE_PERIOD_S)
    # Its namespace ends with process 1, and so may it.
    assert stop.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), (stop.returncode, said)
    assert goes.pod.program.wait_end(_WAIT_S) == 0, goes.pod.program.output()
    hook.join(_WAIT_S)
    assert infer(stays.pod, service.name)[0] == service.model_id
    assert goes.pod.termination_log.read_text(encoding="utf-8") == ""
    print("stop.sh wait: ended with 0, and the other pod has its model")


async def check_running(image: Stage) -> None:
    """Check it in front of an etcd."""
    async with embedded_etcd() as etcd:
        await anyio.to_thread.run_sync(check_pods, image, str(etcd.endpoint))


def main() -> None:
    """Build, measure, start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=_BUILD / "base", help="a root of Debian's")
    base = parser.parse_args().base
    if os.getuid() != 0:
        raise SystemExit("needs root: for debootstrap, chroot and mounts")
    _BUILD.mkdir(parents=True, exist_ok=True)
    steps = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    image = Build(ROOT, _BUILD, debian_base(base)).run(steps)
    size = size_bytes(image.root)
    print(f"image: {size / 1e6:.0f} MB, of which the base is {size_bytes(base) / 1e6:.0f}")
    assert size < SIZE_MAX_BYTES
    assert image.ports == (8033, 8080, 8089, 8090, 2112)
    assert os.access(image.root / tables.STOP_SCRIPT.lstrip("/"), os.X_OK)
    anyio.run(check_running, image)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
