"""Lets TorchTitan run without an accelerator; does nothing if there is one.

TorchTitan fixes its device when `torchtitan.tools.utils` is imported, and takes "cuda" if it finds none (0.2.2 and
0.3.0). A TorchTitan that takes "cpu" makes this module needless.
"""

import importlib
import importlib.util
import os
import resource
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._utils
import torch.distributed.checkpoint  # binds the functions patched below by name: it must get the originals
from torch import nn
from torch.distributed.fsdp import FSDPModule

from examples.mosaic_streaming.upstream.patch import replaced

ACTIVE = torch._utils._get_available_device_type() is None
"""Whether this process has no accelerator, so that TorchTitan runs on the CPU."""


def memory_stats(device: Any = None) -> dict[str, int]:
    """The process's peak memory, in bytes, in place of a device's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


MACHINE = types.SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
LACKING = {
    "current_device": lambda: 0,  # an index, as `barrier(device_ids=...)` needs it; `torch.cpu` returns "cpu"
    "get_device_name": lambda device=None: "CPU",
    "get_device_properties": lambda device=None: MACHINE,
    "memory_stats": memory_stats,
    "reset_peak_memory_stats": lambda device=None: None,  # the peak of a process can't be reset
    "empty_cache": lambda: None,
}
"""The device functions that TorchTitan calls and `torch.cpu` lacks."""


def sum_gradients_with_gloo(parallelize_fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make a TrainSpec's `parallelize_fn` reduce FSDP gradients with an operation that gloo supports.

    Source: FSDP2 averages with `ReduceOp.PREMUL_SUM`, which gloo refuses (torch 2.13).
    """
    if not ACTIVE:
        return parallelize_fn

    def parallelize(*args: Any, **kwargs: Any) -> nn.Module:
        model = parallelize_fn(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize


def profile_cpu(*, activities: list[Any], **settings: Any) -> Any:
    """Profile the CPU alone; TorchTitan 0.2.2 also asks for an activity that is None (tools/profiling.py)."""
    return torch.profiler.profile(activities=[activity for activity in activities if activity], **settings)


def prepare_torchtitan() -> None:
    """Import torchtitan so that it finds the CPU if there is no accelerator; call this before anything imports it."""
    if not ACTIVE:
        return
    module = types.SimpleNamespace(**vars(torch.cpu) | LACKING)
    with (
        replaced(torch._utils, "_get_available_device_type", lambda: "cpu"),
        replaced(torch._utils, "_get_device_module", lambda device_type: module),
    ):
        importlib.import_module("torchtitan.tools.utils")
    if importlib.util.find_spec("torchtitan.tools.profiling") is None:  # 0.3, which asks for what there is
        return
    profiling: Any = importlib.import_module("torchtitan.tools.profiling")
    profiler = types.SimpleNamespace(**vars(torch.profiler) | {"profile": profile_cpu})
    profiling.torch = types.SimpleNamespace(**vars(torch) | {"profiler": profiler})


def prepare_config(config: Any, keeps_precision: bool) -> None:
    """Change in a config of TorchTitan 0.3 what a CPU can't do: attention but SDPA, CUDA graphs, and bfloat16.

    Flex attention has no backward pass there (torch 2.15). bfloat16 is only slow, and can be kept.
    """
    attention: Any = importlib.import_module("torchtitan.models.common.attention")
    for kind in (attention.FlexAttention.Config, attention.VarlenAttention.Config):
        for _, _, parent, name in list(config.model_spec.traverse(kind)):
            setattr(parent, name, attention.ScaledDotProductAttention.Config())
    config.training.disable_cuda_graphs = True
    if not keeps_precision:
        config.training.mixed_precision_param = "float32"
