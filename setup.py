"""Build the extension modules; everything else stands in ``pyproject.toml``.

``MM_BUILD_DEBUG=1`` is the one switch of a debug build: line tracing (for coverage), C assertions,
no optimisation, and ``mm/*.html`` that shows what each line became.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("MM_BUILD_DEBUG", "0") == "1"

#: For every Cython module of ours; bench and tests that compile against the table use them too.
DIRECTIVES: dict[str, object] = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
    "linetrace": DEBUG,
}

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # what Cython generates has these, not what we write
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]
COMPILE_ARGS = ["-std=gnu11", *WARNINGS, *(["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3"])]
MACROS: list[tuple[str, str | None]] = (
    [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")] if DEBUG else []
)


#: By the name that pkg-config has for it: the oldest version that will do, and its package.
LIBRARIES = {"libnghttp2": ("1.48", "libnghttp2-dev"), "openssl": ("1.1.1", "libssl-dev")}


def library(name: str, option: str) -> list[str]:
    """Ask pkg-config how to build against a library; exits with what to do if it is missing."""
    oldest, package = LIBRARIES[name]
    tool = shutil.which("pkg-config")
    if tool is None:
        raise SystemExit("pkg-config is missing (Debian: apt-get install pkg-config)")
    answer = subprocess.run(
        [tool, option, f"{name} >= {oldest}"], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise SystemExit(
            f"{name} ({oldest} or newer) and its headers are missing; mm/wire is built on them "
            f"(Debian: apt-get install {package}): {answer.stderr.strip()}"
        )
    return answer.stdout.split()


#: What nghttp2 does about floods. Both came into older versions by patches as well, so the version
#: does not tell.
GUARDS = ("nghttp2_option_set_stream_reset_rate_limit", "nghttp2_option_set_max_continuations")


def check_nghttp2() -> None:
    """Refuse a library with holes (CVE-2023-44487, CVE-2024-28182)."""
    tool = shutil.which("pkg-config") or "pkg-config"
    answer = subprocess.run(
        [tool, "--variable=includedir", "libnghttp2"], capture_output=True, text=True, check=True
    )
    header = os.path.join(answer.stdout.strip(), "nghttp2", "nghttp2.h")
    with open(header, encoding="utf-8") as file:
        text = file.read()
    missing = [name for name in GUARDS if name not in text]
    if missing:
        raise SystemExit(f"libnghttp2 is too old, or not patched: it lacks {', '.join(missing)}")


EXTENSIONS = [
    Extension(
        "mm._lru",
        ["mm/_lru.pyx"],
        extra_compile_args=COMPILE_ARGS,
        define_macros=MACROS,
    ),
    Extension(
        "mm.wire._wire",
        ["mm/wire/_wire.pyx"],
        # Parts of the table that it does not use are in its map all the same.
        extra_compile_args=[
            *COMPILE_ARGS,
            "-Wno-unused-function",
            *(flag for name in LIBRARIES for flag in library(name, "--cflags")),
        ],
        extra_link_args=[flag for name in LIBRARIES for flag in library(name, "--libs")],
        define_macros=MACROS,
    ),
]

if __name__ == "__main__":
    check_nghttp2()
    setup(
        ext_modules=cythonize(
            EXTENSIONS, compiler_directives=DIRECTIVES, annotate=DEBUG, force=DEBUG
        )
    )
