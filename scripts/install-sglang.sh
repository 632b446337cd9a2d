#!/usr/bin/env bash
# install-sglang.sh VENV SGLANG ROUTER TORCH TORCHVISION: install SGLang into VENV such that its CPU engine starts.
# Its own dependencies bring gigabytes of CUDA: tests/sglang/requirements.txt has the others, and torch is the CPU's.
# What is missing then is doubled by tests/sglang/shim, which a .pth file puts on the path of every process.
# sglang-router goes into VENV/router, to be named on PYTHONPATH: its program is called `smg`, like that of smg.
set -euo pipefail

venv=$1
sglang=$2
router=$3
torch=$4
torchvision=$5
tests=$(cd "$(dirname "$0")/../tests/sglang" && pwd)
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "make: SGLang needs Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
"${pip[@]}" install "$torch" -r "$tests/requirements.txt"
"${pip[@]}" install --no-deps "$sglang" "$torchvision"
"${pip[@]}" install --no-deps --upgrade --target "$venv/router" "$router"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\nimport torchvision_operators\n' "$tests/shim" >"$site/kvroom-sglang-shim.pth"
