"""Every benchmark can be started, from wherever one is; what it measures is seen by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def test_each_tells_how_it_is_used(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    files = [file for file in sorted(BENCH.glob("[a-z]*.py")) if "__main__" in file.read_text()]
    assert len(files) > 10
    started = [
        subprocess.Popen(
            [sys.executable, str(file), "--help"],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for file in files
    ]
    for file, process in zip(files, started, strict=True):
        output, complaints = process.communicate(timeout=60)
        assert (process.returncode, complaints) == (0, ""), file.name
        assert output.startswith(f"usage: {file.name}"), file.name
