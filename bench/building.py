"""Building a Cython module against the table on the fly, for benchmarks and the readers' tests.

It owns where such builds go (``build/…``, never the source tree) and that they happen once per
change. The flags and directives are those of ``setup.py``, so what is measured is what is shipped.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _settings() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_settings")


def build(
    name: str,
    source: Path,
    directory: Path,
    *,
    extra_args: Sequence[str] = (),
    root: Path = ROOT,
) -> Path:
    """Compile one Cython source to the extension module ``name`` below ``directory``.

    ``root`` is where the table's map of memory is taken from.
    """
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    settings = _settings()
    extension = Extension(
        name,
        [str(source)],
        depends=[str(each) for each in (root / "mm").glob("_lru*.p*") if each.suffix != ".py"],
        extra_compile_args=[*settings["COMPILE_ARGS"], *extra_args],
        extra_link_args=[each for each in extra_args if each.startswith("-fsanitize")],
        include_dirs=[str(source.parent)],
    )
    modules = cythonize(
        [extension],
        include_path=[str(root)],
        build_dir=str(directory / "c"),
        compiler_directives=settings["DIRECTIVES"],
        quiet=True,
    )
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib = str(directory)
    command.build_temp = str(directory / "o")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(name))


def load(name: str, source: Path) -> ModuleType:
    """Build the module for this Python, import it and answer it."""
    path = build(name, source, ROOT / "build" / f"extras-{sys.implementation.cache_tag}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
