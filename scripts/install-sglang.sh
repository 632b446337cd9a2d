#!/usr/bin/env bash
# install-sglang.sh VENV SGLANG ROUTER TORCH TORCHVISION: install SGLang into VENV so that its CPU engine starts.
# SGLang's own dependencies include gigabytes of CUDA packages, so it is installed without dependencies. Those that it
# needs here are in tests/sglang/requirements.txt, and torch is a CPU build. tests/sglang/shim has doubles of the
# missing packages, and a .pth file puts it on the path of every process.
# sglang-router goes into VENV/router (add it to PYTHONPATH), because its program has the same name as smg's: `smg`.
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
