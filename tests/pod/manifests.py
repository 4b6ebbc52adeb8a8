"""Renders config/ with kustomize and holds it to the schemas of Kubernetes: `make test-manifests`.

Not a part of the suite: it needs kustomize (alone, in kubectl, or built by Go) and a package of
schemas that is larger than all of ours; the first run installs what is missing below build/. What
has to agree with the code is looked at as well: names of settings, ports, paths.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mm.settings_reference import SETTINGS
from tests.pod import tables

ROOT: Final = Path(__file__).parents[2]
_BUILD: Final = ROOT / "build" / "manifests"
_PACKAGES: Final = ("kubernetes-validate==1.37.0",)
_KUSTOMIZE: Final = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"
#: The oldest and the newest Kubernetes that it should do for.
_VERSIONS: Final = ("1.28", "1.34")
OVERLAYS: Final = ("example", "production", "two-kinds")
COMPONENTS: Final = (
    *("etcd", "tls", "socket", "port", "prometheus", "autoscaling", "spread"),
    *("management", "access"),
)


def kustomize() -> list[str]:
    """Answer the command that renders a directory."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    go = shutil.which("go")
    if go is None:
        raise SystemExit("needs kustomize, kubectl, or Go to build kustomize with")
    program = _BUILD / "bin" / "kustomize"
    if not program.exists():
        environment = {**os.environ, "GOBIN": str(program.parent)}
        subprocess.run([go, "install", _KUSTOMIZE], env=environment, check=True)
    return [str(program), "build"]


def tools() -> tuple[Any, Any]:
    """Answer the YAML parser and the validator, installed now unless they are there."""
    directory = _BUILD / "packages"
    if not directory.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(directory)]
        subprocess.run([*command, *_PACKAGES], check=True)
    sys.path.append(str(directory))
    return importlib.import_module("yaml"), importlib.import_module("kubernetes_validate")


def containers_of(manifest: Any) -> Iterator[Any]:
    """Answer the containers `mm` of a Deployment of ours."""
    if manifest["kind"] == "Deployment":
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            if container["name"] == "mm":
                yield container


def check_container(container: Any, known: set[str]) -> None:
    """Hold a container to what the code and the image have."""
    names = [each["name"] for each in container["env"]]
    assert len(names) == len(set(names)), names
    assert set(names) <= known, set(names) - known
    probes = {"readinessProbe": tables.READINESS, "livenessProbe": tables.LIVENESS}
    for name, probe in probes.items():
        asked = container[name]
        assert asked["httpGet"] == {"path": probe.path, "port": probe.port}
        assert asked["timeoutSeconds"] == probe.timeout_s
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == list(tables.STOP_COMMAND)
    # The image's own entry point and user.
    assert not {"command", "args", "workingDir"} & container.keys()
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["capabilities"] == {"drop": ["ALL"]}
    values = {each["name"]: each.get("value") for each in container["env"]}
    # Whole directories: what is mounted by a subPath stays as it was when the pod was made.
    mounts = {
        each["mountPath"] for each in container.get("volumeMounts", ()) if "subPath" not in each
    }
    for name, value in values.items():
        if name.endswith("_PATH") and value:
            assert str(Path(value).parent) in mounts, name


def check_ports(service: Any, policy: Any, container: Any) -> None:
    """Hold a container's ports, those of the Service and who is let in to each other: nobody gets
    to that for management but pods that are told apart by a label.
    """
    values = {each["name"]: each.get("value") for each in container["env"]}
    listens = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert len(set(listens.values())) == len(listens) == len(container["ports"]), listens
    called = {each["port"]: listens[each["targetPort"]] for each in service["spec"]["ports"]}
    assert all(port == target for port, target in called.items()), called
    peers, clients, *managers = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"] == service["spec"]["selector"]
    assert {each["port"] for each in peers["ports"]} == tables.PEER_PORTS
    assert {each["port"] for each in clients["ports"]} == {tables.GRPC_PORT, tables.METRICS_PORT}
    management = values.get("MM_MANAGEMENT_PORT")
    if management is None:
        assert called.keys() == {tables.GRPC_PORT}
        assert not managers
        return
    assert called.keys() == {tables.GRPC_PORT, int(management)}
    assert listens["management"] == int(management)
    (rule,) = managers
    assert [each["port"] for each in rule["ports"]] == [int(management)]
    assert rule["from"], "everybody"
    for each in rule["from"]:
        assert each["podSelector"].get("matchLabels"), "every pod"


def check_access(container: Any, volumes: list[Any]) -> None:
    """See that who may do what comes from a Secret, and nothing is written there."""
    values = {each["name"]: each.get("value") for each in container["env"]}
    path = values.get("MM_ACCESS_CONFIG_PATH")
    if path is None:
        return
    at = str(Path(path).parent)
    mount = next(each for each in container["volumeMounts"] if each["mountPath"] == at)
    assert mount["readOnly"] is True
    volume = next(each for each in volumes if each["name"] == mount["name"])
    assert volume["secret"]["secretName"]
    assert not volume["secret"].get("optional"), "without it anybody might do anything"


def check(manifests: list[Any], known: set[str]) -> None:
    """Hold what was rendered together to itself and to the code."""
    service = next(m for m in manifests if m["kind"] == "Service" and m["metadata"]["name"] == "mm")
    policy = next(m for m in manifests if m["kind"] == "NetworkPolicy")
    wanted = service["spec"]["selector"]
    found = 0
    for manifest in manifests:
        for container in containers_of(manifest):
            found += 1
            check_container(container, known)
            pod = manifest["spec"]["template"]
            assert wanted.items() <= pod["metadata"]["labels"].items()
            chosen = manifest["spec"]["selector"]["matchLabels"]
            assert chosen.items() <= pod["metadata"]["labels"].items()
            values = {each["name"]: each.get("value") for each in container["env"]}
            assert values["MM_SERVICE_NAME"] == service["metadata"]["name"]
            grace_s = pod["spec"]["terminationGracePeriodSeconds"]
            assert int(values["SHUTDOWN_TIMEOUT_MS"]) == grace_s * 1000
            volumes = pod["spec"].get("volumes", [])
            mounts = {each["name"] for each in container.get("volumeMounts", ())}
            assert mounts <= {each["name"] for each in volumes}
            check_ports(service, policy, container)
            check_access(container, volumes)
    assert found


def alone(component: str) -> Path:
    """Answer a directory that has nothing but the base and one component."""
    directory = _BUILD / "alone" / component
    directory.mkdir(parents=True, exist_ok=True)
    up = os.path.relpath(ROOT / "config", directory)
    (directory / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{up}/base]\ncomponents: [{up}/components/{component}]\n",
        encoding="utf-8",
    )
    return directory


def main() -> None:
    """Render and check everything; says what it did."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    command = kustomize()
    yaml, validator = tools()
    known = {name for setting in SETTINGS for name in setting.names}
    places = [ROOT / "config/base", *(ROOT / "config/overlays" / each for each in OVERLAYS)]
    places += [alone(each) for each in COMPONENTS]
    for place in places:
        rendered = subprocess.run(
            [*command, str(place)], check=True, capture_output=True, text=True
        )
        manifests = list(yaml.safe_load_all(rendered.stdout))
        for manifest in manifests:
            for version in _VERSIONS:
                validator.validate(manifest, version, strict=True)
        check(manifests, known)
        kinds = ", ".join(sorted(manifest["kind"] for manifest in manifests))
        print(f"{place.relative_to(ROOT)}: {len(manifests)} valid ({kinds})")


if __name__ == "__main__":
    main()
