#!/usr/bin/env bash
# Writes requirements.lock anew: every package of every extra, pinned with hashes, for all
# supported Pythons at once. Says nothing of where packages come from.
set -euo pipefail
cd "$(dirname "$0")/.."

"$PY" -m pip install --quiet --disable-pip-version-check uv
{
    printf '# Pinned packages for development, tests and the demo, Python 3.11 and newer.\n'
    printf '# Written by `make lock` from pyproject.toml; do not edit.\n'
    "$PY" -m uv pip compile --quiet --universal --upgrade --python-version 3.11 --all-extras \
        --generate-hashes --no-header --no-emit-index-url --no-emit-find-links pyproject.toml
} >requirements.lock.new
mv requirements.lock.new requirements.lock
