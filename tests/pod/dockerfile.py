"""Carries out a Dockerfile where there is no container runtime: a clean root directory a stage.

Knows what our Dockerfile uses, and refuses what it does not know, so that no step is left out
unseen. The base image is a minimal Debian made by debootstrap, without documentation, as the slim
images are. Runs as root: each ``RUN`` is a shell in the stage's root, with a file system, processes
and mounts of its own. What a layer cache does is not imitated.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

#: As a container has it before any ENV.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What the slim images of Debian are made without.
_LEFT_OUT: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")
#: How this machine reaches its registries: names, and whom it trusts (for pip, at another place:
#: the package of certificates writes its own).
_NAMES: Final = ("etc/resolv.conf", "etc/hosts")
_TRUSTED: Final = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(slots=True)
class Stage:
    """A root directory and what is said of it."""

    root: Path
    name: str = ""
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    labels: dict[str, str] = field(default_factory=dict)
    working_directory: str = "/"
    user: str = ""
    ports: tuple[int, ...] = ()
    entry_point: tuple[str, ...] = ()
    health: tuple[str, ...] = ()


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Answer each instruction and what follows it, on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def substituted(text: str, values: Mapping[str, str]) -> str:
    """Answer the text with ``${NAME}`` replaced; a name that nobody set is an error."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def ignored(name: str, patterns: Sequence[str]) -> bool:
    """Answer whether .dockerignore leaves a file out: the last pattern that matches decides."""
    is_ignored = False
    parents = [name, *(str(parent) for parent in PurePosixPath(name).parents)]
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if wanted.startswith("**/"):
            matches = any(fnmatch.fnmatch(PurePosixPath(each).name, wanted[3:]) for each in parents)
        else:
            matches = any(fnmatch.fnmatchcase(each, wanted) for each in parents if each != ".")
        if matches:
            is_ignored = not pattern.startswith("!")
    return is_ignored


class Build:
    """One run over a Dockerfile; the last stage is the image."""

    def __init__(self, context: Path, directory: Path, base: Path) -> None:
        self._context = context
        self._directory = directory
        self._base = base
        self._stages: list[Stage] = []
        self._arguments: dict[str, str] = {}
        text = (context / ".dockerignore").read_text(encoding="utf-8")
        self._ignore = [line for line in text.splitlines() if line and not line.startswith("#")]

    def run(self, text: str) -> Stage:
        """Carry it out."""
        for name, rest in instructions(text):
            print(f"==> {name} {rest}", flush=True)
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise ValueError(f"the Dockerfile has {name}, which nobody here can carry out")
            step(rest)
        return self._stages[-1]

    @property
    def _stage(self) -> Stage:
        return self._stages[-1]

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._arguments[name] = default

    def _from(self, rest: str) -> None:
        base, *as_name = re.split(r"\s+AS\s+", substituted(rest, self._arguments))
        assert base == self._arguments["BASE"], f"only the base is known here, and not {base}"
        root = self._directory / f"stage-{len(self._stages)}"
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", self._base, root], check=True)
        self._stages.append(Stage(root, as_name[0] if as_name else ""))

    def _run(self, rest: str) -> None:
        stage = self._stage
        command = f"cd {shlex.quote(stage.working_directory)} && {rest}"
        run_in(stage.root, ["/bin/sh", "-ec", command], stage.environment)

    def _copy(self, rest: str) -> None:
        source, words = self._context, rest.split()
        is_context = not words[0].startswith("--from=")
        if not is_context:
            name = words.pop(0).removeprefix("--from=")
            source = next(stage.root for stage in self._stages if stage.name == name)
        *names, target = words
        to = self._stage.root / (self._stage.working_directory + "/" + target).lstrip("/")
        if target.startswith("/"):
            to = self._stage.root / target.lstrip("/")
        for name in names:
            path = source / name.lstrip("/")
            where = to / path.name if target.endswith("/") and path.is_file() else to
            self._copy_one(path, where, is_context=is_context)

    def _copy_one(self, path: Path, to: Path, *, is_context: bool) -> None:
        """Copy a file, or what is in a folder, as it is but for who owns it."""

        def left_out(folder: str, names: list[str]) -> set[str]:
            at = Path(folder).relative_to(self._context)
            return {each for each in names if ignored((at / each).as_posix(), self._ignore)}

        to.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            ignore = left_out if is_context else None
            shutil.copytree(path, to, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            return
        if is_context:
            name = path.relative_to(self._context).as_posix()
            assert not ignored(name, self._ignore), f".dockerignore leaves out {name}"
        shutil.copy2(path, to)
        shutil.chown(to, 0, 0)

    def _env(self, rest: str) -> None:
        self._stage.environment |= dict(word.split("=", 1) for word in shlex.split(rest))

    def _label(self, rest: str) -> None:
        self._stage.labels |= dict(word.split("=", 1) for word in shlex.split(rest))

    def _workdir(self, rest: str) -> None:
        self._stage.working_directory = rest
        (self._stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _expose(self, rest: str) -> None:
        self._stage.ports = tuple(int(port) for port in rest.split())

    def _user(self, rest: str) -> None:
        self._stage.user = rest

    def _healthcheck(self, rest: str) -> None:
        self._stage.health = tuple(json.loads(rest.partition("CMD ")[2]))

    def _entrypoint(self, rest: str) -> None:
        self._stage.entry_point = tuple(json.loads(rest))


def run_in(root: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command in a root directory, with a /proc, a /dev and the network of this machine."""
    quoted = shlex.quote(str(root))
    mounts = [
        f"mount -t proc proc {quoted}/proc",
        f"mount --rbind /dev {quoted}/dev",
        f"mount -t tmpfs tmpfs {quoted}/tmp",
        f"mount -t tmpfs tmpfs {quoted}/run",
        f"cp {_TRUSTED} {quoted}/run/trusted.crt",
    ]
    for name in _NAMES:
        (root / name).touch()
        mounts.append(f"mount --bind /{name} {quoted}/{name}")
    script = " && ".join([*mounts, f'exec chroot {quoted} "$@"'])
    own = {
        **environment,
        "DEBIAN_FRONTEND": "noninteractive",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PIP_CERT": "/run/trusted.crt",
    }
    unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    subprocess.run([*unshared, "sh", "-ec", script, "sh", *command], env=own, check=True)


def debian_base(path: Path) -> Path:
    """Answer a minimal Debian like the base image, made now unless it is there already."""
    if path.exists():
        return path
    fresh = path.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", "bookworm", str(fresh)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (fresh / "etc/dpkg/dpkg.cfg.d/docker").write_text(
        "".join(f"path-exclude /{each}/*\n" for each in _LEFT_OUT), encoding="utf-8"
    )
    for each in (*_LEFT_OUT, "var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/i18n"):
        shutil.rmtree(fresh / each, ignore_errors=True)
        (fresh / each).mkdir()
    # Security updates, as the base image has them.
    (fresh / "etc/apt/sources.list").write_text(
        "deb http://deb.debian.org/debian bookworm main\n"
        "deb http://deb.debian.org/debian bookworm-updates main\n"
        "deb http://deb.debian.org/debian-security bookworm-security main\n",
        encoding="utf-8",
    )
    fresh.rename(path)
    return path


def size_bytes(root: Path) -> int:
    """Answer what all files of a root directory have in them."""
    command = ["du", "--summarize", "--one-file-system", "--apparent-size", "--block-size=1"]
    answer = subprocess.run([*command, root], check=True, capture_output=True, text=True)
    return int(answer.stdout.split()[0])
