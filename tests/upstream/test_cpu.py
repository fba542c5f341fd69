"""TorchTitan on the CPU, and untouched where there is an accelerator."""

import subprocess
import sys

import pytest

WITH_ACCELERATOR = """
import sys, torch, torch._utils
torch._utils._get_available_device_type = find = lambda: "cuda"
get = torch._utils._get_device_module
from examples.mosaic_streaming.upstream import cpu
cpu.prepare_torchtitan()
assert not cpu.ACTIVE
assert "torchtitan" not in sys.modules
assert torch._utils._get_available_device_type is find
assert torch._utils._get_device_module is get
assert cpu.sum_gradients_with_gloo(print) is print
"""


@pytest.mark.long
def test_nothing_is_changed_where_there_is_an_accelerator() -> None:
    ended = subprocess.run([sys.executable, "-c", WITH_ACCELERATOR], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_torchtitan_finds_the_cpu_and_torch_is_as_before() -> None:
    import torch
    import torch._utils
    from torchtitan.tools import utils

    assert utils.device_type == "cpu"
    assert utils.device_module.current_device() == 0
    assert utils.device_module.is_available()
    assert utils.device_module.memory_stats()["active_bytes.all.peak"] > 0
    assert utils.device_module.get_device_properties().total_memory > 1 << 30
    assert torch._utils._get_available_device_type() is None
    assert torch._utils._get_device_module("cpu") is torch.cpu
