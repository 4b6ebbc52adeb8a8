#!/usr/bin/env bash
# Without an argument lists the benchmarks with the first line of what they say of themselves;
# with a name (and its own arguments) runs that one.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
    name=$1
    shift
    [ -d "bench/$name" ] && exec "$PY" -m "bench.$name" "$@"
    exec "$PY" "bench/$name.py" "$@"
fi
echo 'make bench ARGS="NAME [its own arguments]"'
echo
for file in bench/*.py bench/*/__main__.py; do
    name=${file#bench/}
    name=${name%.py}
    name=${name%/__main__}
    case $name in _*) continue ;; esac
    # Other helpers have no command line.
    grep -q '__main__' "$file" || [[ $file == */__main__.py ]] || continue
    printf '  %-14s %s\n' "$name" "$("$PY" - "$file" <<'PY'
import ast, pathlib, sys

text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
print((ast.get_docstring(ast.parse(text)) or "").partition("\n")[0])
PY
)"
done
