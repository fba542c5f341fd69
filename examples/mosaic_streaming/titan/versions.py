"""Which generation of TorchTitan is installed, and what the settings of one are called in the other."""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from typing import Any

from examples.mosaic_streaming.errors import ConfigError, DataError

SUPPORTED = {"0.2": "v0_2", "0.3": "v0_3"}
"""The generations, and their packages in this room. Of 0.2, 0.2.2 is needed."""
RANGE = "torchtitan >= 0.2.2, < 0.4"

RENAMED = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    **{f"validation.{key}": f"validator.{key}" for key in ("enable", "freq", "steps", "local_batch_size", "seq_len")},
    **{f"profiling.{key}": f"profiler.{key}" for key in ("enable_profiling", "profile_freq", "profiler_active")},
    **{f"profiling.{key}": f"profiler.{key}" for key in ("profiler_warmup", "save_traces_folder")},
    **{f"profiling.{key}": f"profiler.{key}" for key in ("enable_memory_snapshot", "save_memory_snapshot_folder")},
}
"""Settings of TorchTitan 0.2, and what 0.3 calls them. Settings that are in neither column have one name in both."""

STREAMS = "Streams are set in the files of --mosaic-config and --mosaic-validation-config."
OWN_FUNCTION = "Make the model in a function of your own, and name that with --module and --config."
GONE: dict[str, tuple[Any, str]] = {
    "job.custom_config_module": ("", OWN_FUNCTION),
    "model.converters": ([], f"Converters are arguments of a model's `model_registry`. {OWN_FUNCTION}"),
    "model.print_after_conversion": (False, "The log shows the model's size."),
    "model.tokenizer_path": (None, "The nearest is hf_assets_path."),
    "optimizer.early_step_in_backward": (False, "Gradients are reduced, then applied."),
    "activation_checkpoint.selective_ac_option": ("op", 'Its selective mode is what 0.2 calls "op".'),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        ["moe.router.gate"],
        "The nearest is activation_checkpoint.force_recompute_mm_shapes_by_fqns.",
    ),
    "activation_checkpoint.early_stop": (False, "torch stops early by itself."),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, "There is no [fault_tolerance]."),
    "parallelism.disable_loss_parallel": (False, "The loss is computed in parallel where logits are."),
    "parallelism.expert_tensor_parallel_degree": (1, "The nearest is parallelism.expert_parallel_degree."),
    "parallelism.context_parallel_rotate_method": ("allgather", "It always gathers."),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (True, "The schedule decides."),
    "training.dataset": ("c4_test", STREAMS),
    "validation.dataset": ("c4_validation", STREAMS),
    **dict.fromkeys(("training.dataset_path", "training.dataloader"), (None, STREAMS)),
    **dict.fromkeys(("validation.dataset_path", "validation.dataloader"), (None, STREAMS)),
    **dict.fromkeys(("dataloader", "validator.dataloader"), (None, STREAMS)),
    "quantize": (None, f"Its converters are arguments of a model's `model_registry`. {OWN_FUNCTION}"),
    "experimental.custom_args_module": ("", OWN_FUNCTION),
    "fault_tolerance": (None, "Checkpoints and torchrun's restarts are what there is."),
    "memory_estimation": (None, "Try a few steps."),
}
"""Settings of 0.2, or sections, that 0.3 has no counterpart of: the value that means the same there, and why."""

OWN_FLAGS = ("mosaic_config", "mosaic_validation_config", "mosaic_position")
IN_FILE = {
    **dict.fromkeys(("model.name", "model.flavor"), "Set the model in the job's file, or by --module and --config."),
    **dict.fromkeys(("job.description", "experimental.custom_import"), "Set it in the job's file."),
    **dict.fromkeys(("module", "config", *OWN_FLAGS), "Give it before the `--`."),
    "activation_checkpoint.mode": "Behind all other flags, give activation-checkpoint:full, or another of these.",
    "optimizer": "It has groups of parameters: set [optimizer] in the job's file, or make the config in a function.",
    "job": "See the list: python -m examples.mosaic_streaming.train -- --help",
}
"""Settings, or sections, of 0.2 that are no flags in 0.3, and where to set them."""

ON_CPU = {
    "v0_2": "Models with experts, and flavors with flex or varlen attention, need a GPU.",
    "v0_3": "Attention is SDPA, over whole rows, not within documents; float32; no CUDA graphs.",
}
"""What the log says of a machine without an accelerator."""


def generation() -> str:
    """The package for the TorchTitan that is installed; a ConfigError says which there may be."""
    try:
        version = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"TorchTitan is not installed. Install {RANGE}.") from error
    package = SUPPORTED.get(".".join(version.split(".")[:2]))
    if package is None or version in ("0.2.0", "0.2.1"):
        raise ConfigError(f"TorchTitan {version} is installed, expected {RANGE}.")
    return package


def check_flags(flags: Iterable[str], names: dict[str, str], installed: str, reasons: dict[str, str]) -> None:
    """Raise ConfigError for a flag of the other generation, with its spelling in the one that is installed.

    `names` has the settings that have another name there, and `reasons` what to do where a setting or section has none.
    """
    for flag in flags:
        key, equals, value = flag.removeprefix("--").partition("=")
        key = key.replace("-", "_") if flag.startswith("--") else ""
        plain, no = key.replace(".no_", "."), "no-" if ".no_" in key else ""
        if plain in names:
            section, dot, name = names[plain].rpartition(".")
            raise ConfigError(f"{flag}: TorchTitan {installed} calls it --{section}{dot}{no}{name}{equals}{value}.")
        if reason := find(reasons, plain):
            raise ConfigError(f"{flag}: not a flag of TorchTitan {installed}. {reason}")


def find(table: dict[str, Any], key: str) -> Any:
    """What a table has for a setting, or for the section that it is in."""
    while key and key not in table:
        key = key.rpartition(".")[0]
    return table.get(key)


@contextlib.contextmanager
def names_as_given(in_code: bool) -> Iterator[None]:
    """In errors that leave this context, call settings as 0.3 does if the job is given in code, not in a file."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not in_code:
            raise
        names = RENAMED | {"model.flavor": "model_spec.flavor", "model.name": "model_spec.name"}
        keys = "|".join(map(re.escape, names))
        text = re.sub(rf"(?<![\w.])(?:{keys})(?!\w)", lambda found: names[found[0]], str(error))
        raise type(error)(text) from error


def without_gone(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Leave out settings of a job's file that 0.3 doesn't have and that are off; a ConfigError names one that is on."""
    kept = {}
    for key, value in values.items():
        off, reason = find(GONE, key) or (None, "")
        if not reason:
            kept[key] = value
        elif value != off and values.get(f"{key.partition('.')[0]}.enable", True):
            raise ConfigError(f"{key} = {value!r} in {path}: TorchTitan 0.3 has no such setting. {reason}")
    return kept
