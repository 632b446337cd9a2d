#!/usr/bin/env bash
# fetch-mori.sh PYTHON REQUIREMENT: download mori's wheel into the user's cache, for a test that reads its API file.
# The wheel needs another Python and ROCm, so it is not installed. Without a network the test is skipped.
set -euo pipefail

cache="${XDG_CACHE_HOME:-$HOME/.cache}/kvroom/wheels"
if compgen -G "$cache/amd_mori-*.whl" >/dev/null; then
    exit 0
fi
mkdir -p "$cache"
"$1" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: --python-version 312 \
    --platform manylinux_2_39_x86_64 --dest "$cache" "$2" ||
    echo "make: cannot download $2; the test that compares mori's double with it is skipped" >&2
