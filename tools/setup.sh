#!/usr/bin/env bash
# Sets up what the project needs, one step a call; the Makefile decides which steps are due.
#
#   tools/setup.sh packages    system packages (as root, else says the one line to run), the
#                              virtual environment, the pinned Python packages
#   tools/setup.sh extension   the compiled extension and the `mm` program, from this checkout
#
# PYTHON=/path/to/python3 chooses the interpreter; otherwise the newest that works is taken.
# MM_BUILD_DEBUG=1 builds the extension with assertions and line tracing.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv

say() { printf '==> %s\n' "$*"; }

fail() {
    printf '\nset-up failed: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# Whether a C file that includes Python.h gets through the preprocessor.
can_compile() {
    local include
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    printf '#include <Python.h>\n' | cc -I"$include" -E -x c - >/dev/null 2>&1
}

# What the wire is built on (mm/wire).
has_nghttp2() { pkg-config --exists 'libnghttp2 >= 1.48' 2>/dev/null; }
has_openssl() { pkg-config --exists 'openssl >= 1.1.1' 2>/dev/null; }

# Prints the interpreter to use: the newest with all that is needed, else the newest at all.
find_python() {
    local candidate fallback=""
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer" \
            "$PYTHON --version says: $("$PYTHON" --version 2>&1 || true)"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        command -v "$candidate" >/dev/null && is_new_enough "$candidate" || continue
        if has_venv "$candidate" && can_compile "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        [ -n "$fallback" ] || fallback=$candidate
    done
    [ -n "$fallback" ] || fail "Python 3.11 or newer is needed, and none was found on PATH" \
        "python3 --version says: $(python3 --version 2>&1 || true)" \
        "install one, or name it: make ... PYTHON=/path/to/python3.12"
    printf '%s\n' "$fallback"
}

# Installs what is missing, and only that.
install_system_packages() {
    local python=$1 version missing=()
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    if ! has_venv "$python"; then missing+=("python$version-venv"); fi
    if ! can_compile "$python"; then missing+=("python$version-dev"); fi
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    has_nghttp2 || missing+=(libnghttp2-dev)
    has_openssl || missing+=(libssl-dev)
    [ ${#missing[@]} -gt 0 ] || return 0

    command -v apt-get >/dev/null || fail "these are missing, and there is no apt-get here" \
        "a C compiler, pkg-config, libnghttp2 1.48 and OpenSSL 1.1.1 or newer with their headers," \
        "and for $python the venv module and the headers (Python.h)" \
        "(their names on Debian: ${missing[*]})"
    [ "$(id -u)" -eq 0 ] || fail "system packages are missing; run this, then try again:" \
        "sudo apt-get update && sudo apt-get install -y ${missing[*]}"
    say "installing system packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    has_nghttp2 || fail "libnghttp2 is still missing, or older than 1.48, after installing it"
    has_openssl || fail "OpenSSL is still missing, or older than 1.1.1, after installing it"
    has_venv "$python" && can_compile "$python" || fail \
        "$python still lacks its venv module or its headers after installing ${missing[*]}" \
        "name another interpreter: make ... PYTHON=/path/to/python3.12"
}

make_venv() {
    local python
    if [ -z "${PYTHON:-}" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null \
        && can_compile "$venv/bin/python" && has_nghttp2 && has_openssl; then
        return
    fi
    python=$(find_python)
    install_system_packages "$python"
    if [ -z "${PYTHON:-}" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        return  # only libraries were missing
    fi
    say "creating $venv with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv --clear "$venv"
}

install_packages() {
    local count
    make_venv
    count=$(grep -c '^[a-z0-9].*==' requirements.lock)
    say "installing $count pinned packages (about a minute the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --require-hashes -r requirements.lock
}

build_extension() {
    local kind=release
    [ "${MM_BUILD_DEBUG:-0}" = 0 ] || kind=debug
    say "building the extension ($kind)"
    # The flags may have changed with the sources as they were: build it all.
    rm -rf build mm/_lru.c mm/_lru.*.so mm/wire/_wire.c mm/wire/_wire.*.so
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --editable .
    "$venv/bin/python" -c 'import mm._lru, mm.wire'
    # Some environments forbid Python to keep what it compiled: then every start would do it anew.
    "$venv/bin/python" -m compileall -q mm
}

case "${1:-}" in
    packages) install_packages ;;
    extension) build_extension ;;
    *) fail "which step? packages or extension" ;;
esac
