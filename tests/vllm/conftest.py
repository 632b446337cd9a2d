"""vLLM is imported here, once: what its own imports warn of is not ours, while our tests take warnings as errors."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.v1.worker.gpu_model_runner  # noqa: F401 - with everything that the connector meets

from aftermath import pytest_runtest_makereport, pytest_runtest_setup  # noqa: F401
from fixtures import front, logs, model, pair, truth  # noqa: F401
