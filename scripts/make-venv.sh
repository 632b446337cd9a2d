#!/usr/bin/env bash
# make-venv.sh PYTHON VENV: create a virtual environment with pip in it, unless there is one already.
# Debian ships Python without ensurepip: as root this script installs what is missing, otherwise it names the package.
set -euo pipefail

python=$1
venv=$2

if ! command -v "$python" >/dev/null; then
    echo "make: $python is not installed: install Python 3.10 or newer, or set PYTHON=/path/to/python" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "make: $python is $("$python" --version): Python 3.10 or newer is needed; set PYTHON=/path/to/python" >&2
    exit 2
fi
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "make: $python cannot create virtual environments: install its venv package" \
            "(Debian, Ubuntu: apt-get install python3-venv) and run make again" >&2
        exit 2
    fi
    echo "installing python3-venv"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
fi
"$python" -m venv "$venv"
