"""Generate ``mm/pb`` from the ``.proto`` files beside this script: ``make proto``.

Owns the commands and their options; what comes out is committed and never edited. ``--check``
generates into a scratch directory and fails, naming the files, if the committed code differs: that
is what CI runs.

Out come Python messages and client stubs (betterproto2), one Python package a proto package, and
``descriptors.bin``, one FileDescriptorSet of everything, from which the mesh answers server
reflection.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTO_DIR = Path(__file__).resolve().parent
PB_DIR = PROTO_DIR.parent / "mm" / "pb"

#: Stubs for clients only: servers in this project work below grpclib's service classes.
OPTIONS = ("client_generation=async", "server_generation=none")

#: The compiler formats what it writes with the ruff that it finds on PATH and the settings around
#: the working directory. These are ours, so that the outcome depends on neither the caller's
#: directory nor pyproject.toml.
RUFF_SETTINGS = """\
line-length = 100
target-version = "py311"
"""

REQUIREMENTS = "it needs betterproto2-compiler, grpcio-tools and ruff (extras `test` and `dev`)"

PACKAGE_HEADER = "# Made by proto/generate.py: a package that only holds packages.\n"


def generate(out_dir: Path, work_dir: Path) -> None:
    """Write the generated tree into ``out_dir``, which must be empty; ``work_dir`` is scratch."""
    (work_dir / "ruff.toml").write_text(RUFF_SETTINGS)
    sources = sorted(str(path.relative_to(PROTO_DIR)) for path in PROTO_DIR.rglob("*.proto"))
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{PROTO_DIR}",
        f"--python_betterproto2_out={out_dir}",
        f"--python_betterproto2_opt={','.join(OPTIONS)}",
        f"--descriptor_set_out={out_dir / 'descriptors.bin'}",
        "--include_imports",
        *sources,
    ]
    # The plugin and ruff are programs of the same environment, which need not be the activated one.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    run = subprocess.run(
        command,
        cwd=work_dir,
        env={**os.environ, "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode != 0:  # else stderr only lists the files
        raise SystemExit(f"{run.stderr}the generator failed; {REQUIREMENTS}")
    for directory in [out_dir, *(path for path in out_dir.rglob("*") if path.is_dir())]:
        init = directory / "__init__.py"
        if not init.exists() or not init.read_bytes():
            init.write_text(PACKAGE_HEADER)
    (out_dir / "py.typed").unlink()  # mm/py.typed speaks for the whole package


def differences(generated: Path, committed: Path) -> list[str]:
    """Answer the relative paths that are in only one of two trees, or differ in content."""

    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    ours, theirs = files(generated), files(committed)
    changed = {
        name
        for name in ours & theirs
        if not filecmp.cmp(generated / name, committed / name, shallow=False)
    }
    return sorted((ours ^ theirs) | changed)


def main() -> int:
    """Generate, or with ``--check`` compare. Answers the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if mm/pb is not up to date"
    )
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory(prefix="mm-proto-") as scratch:
        out_dir, work_dir = Path(scratch, "pb"), Path(scratch, "work")
        out_dir.mkdir()
        work_dir.mkdir()
        generate(out_dir, work_dir)
        changed = differences(out_dir, PB_DIR)
        if check:
            for name in changed:
                print(f"mm/pb/{name} differs from what proto/ generates", file=sys.stderr)
            if changed:
                print("run `make proto` and commit the outcome", file=sys.stderr)
            return 1 if changed else 0
        for name in changed:  # nothing else is touched: others may be importing it
            target = PB_DIR / name
            if (out_dir / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out_dir / name, target)
            else:
                target.unlink()
    print(f"mm/pb: {len(changed)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
