# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network, no state of the user's, one seed, a reason for every skip."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile


# Before torch and transformers are imported: they read these once. Every xdist worker gets a cache of its own, because
# modules loaded with trust_remote_code are written there.
_CACHE = tempfile.mkdtemp(prefix="locmoe-tests-")
os.environ["HF_HOME"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)
for _name in [name for name in os.environ if name.startswith(("LOCMOE_", "ACCELERATE_"))]:
    del os.environ[_name]

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


# The same examples on every machine, no time limit per example (machines differ), nothing written beside the tests.
hypothesis.settings.register_profile("locmoe", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("locmoe")


def _mend_the_interpreter() -> None:
    """
    Triton 3.6's interpreter makes bounds of loops with `int` of an array with one element, which numpy 2.4 refuses
    (`_patch_lang_tensor` in triton/runtime/interpreter.py).
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_the_interpreter()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def _missing_for_cluster() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"iproute2 is missing ({', '.join(absent)} not found)" if absent else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_devices = torch.cuda.device_count()
    for item in items:
        if (marker := item.get_closest_marker("multigpu")) and num_devices < (needed := marker.args[0]):
            reason = f"needs {needed} CUDA devices, torch finds {num_devices}"
            item.add_marker(pytest.mark.skip(reason=reason))
    if not torch.cuda.is_available():
        _skip(items, "gpu", "needs a CUDA device, torch finds none")
    if (reason := _missing_for_cluster()) is not None:
        _skip(items, "cluster", reason)


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _no_run_left_behind():
    """A plugin that a test turns on in this process would hold for the models of all tests after it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("LOCMOE_")}
    yield
    for name in [name for name in os.environ if name.startswith("LOCMOE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)
    if (module := sys.modules.get("hf_locmoe.distributed.parallel_run")) is not None:
        module.set_parallel_run(None)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    transformers.set_seed(0)
