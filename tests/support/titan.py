"""The TorchTitan that is installed: a job, its flags and what they set, in the words of each generation."""

import argparse
import importlib
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.plan import Plan
from examples.mosaic_streaming.titan.loaded import LoadedJob
from examples.mosaic_streaming.titan.versions import RENAMED, generation
from examples.mosaic_streaming.upstream import cpu

GENERATION = generation()
IS_0_2 = GENERATION == "v0_2"

only_0_2 = pytest.mark.skipif(not IS_0_2, reason="TorchTitan 0.2 alone")
only_0_3 = pytest.mark.skipif(IS_0_2, reason="TorchTitan 0.3 alone")

TOKENIZER = "tests/assets/tokenizer"
NO_FLAGS = ("model.name", "model.flavor", "optimizer", "activation_checkpoint", "experimental", "job.description")
"""Settings, or sections, that a file has in both generations, and flags in 0.2 alone."""


def name_of(key: str) -> str:
    """What the installed TorchTitan calls a setting."""
    return key if IS_0_2 else RENAMED.get(key, key)


ASSETS = f"--{name_of('model.hf_assets_path')}={TOKENIZER}"
"""A flag for recipes, which name assets that have to be downloaded."""


def job_config(**settings: Any) -> Any:
    """TorchTitan's config of a job of Llama 3's debug model, with settings as a file has them: `section__key=value`."""
    values = {"model.name": "llama3_mosaic", "model.hf_assets_path": TOKENIZER}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    if IS_0_2:
        from torchtitan.config import JobConfig

        config = JobConfig()
        for key, value in values.items():
            set_value(config, key, value)
        return config
    translate = importlib.import_module("examples.mosaic_streaming.titan.v0_3.translate").translate
    mosaic = importlib.import_module("examples.mosaic_streaming.titan.v0_3.trainer").mosaic
    config = mosaic(translate(values, "job.toml"), "loader.toml")
    cpu.prepare_config(config, keeps_precision=False)
    return config


def llama3(seq_len: int) -> Any:
    """Llama 3's debug model, without parallelism, for rows of `seq_len` tokens on a CPU."""
    config = job_config(training__seq_len=seq_len)
    if IS_0_2:
        from torchtitan.models.llama3 import Transformer, llama3_args

        llama3_args["debugmodel"].update_from_config(config)
        return Transformer(llama3_args["debugmodel"])
    config.model_spec.model.update_from_config(config=config)
    return config.model_spec.model.build()


def masking(config: Any) -> Any:
    """Give a config's model attention that is kept within documents, as all models of 0.3 have on a GPU."""
    if IS_0_2:
        config.model.flavor = "debugmodel_flex_attn"
        return config
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    for _, _, parent, name in list(config.model_spec.traverse(ScaledDotProductAttention.Config)):
        setattr(parent, name, FlexAttention.Config())
    return config


def set_value(config: Any, key: str, value: Any) -> None:
    """Set a setting, which is called as in a file, in a config."""
    *sections, name = name_of(key).split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, name, value)


def parallel_dims(config: Any, world_size: int) -> Any:
    """TorchTitan's degrees of parallelism on so many ranks."""
    module = importlib.import_module(f"examples.mosaic_streaming.titan.{GENERATION}.job")
    return module.parallel_dims(config, world_size)


def loaded(config: Any, train: LoaderFile | Plan, validation: LoaderFile | None = None) -> LoadedJob:
    """The job of a config and of loaders' files."""
    train = Plan.of(train) if isinstance(train, LoaderFile) else train
    validates = (config.validation if IS_0_2 else config.validator).enable
    dump_folder = config.job.dump_folder if IS_0_2 else config.dump_folder
    folder = os.path.join(dump_folder, config.checkpoint.folder)
    return LoadedJob(config, train, validation, validates, dump_folder, folder, {})


def load(path: Path | str, *titan_flags: str) -> LoadedJob:
    """A job's file, and flags, as a run reads them."""
    module = importlib.import_module(f"examples.mosaic_streaming.titan.{GENERATION}.load")
    loader = "examples/mosaic_streaming/configs/mosaic_dataloader.toml"
    names = {"config": str(path), "module": None, "mosaic_config": loader, "mosaic_validation_config": None}
    job: LoadedJob = module.load_job(argparse.Namespace(**names), list(titan_flags))
    return job


def load_config(path: Path | str, *titan_flags: str) -> Any:
    """TorchTitan's config of a job's file, and flags."""
    return load(path, *titan_flags).job_config


def spell(job_file: Path, titan_flags: tuple[str, ...] | list[str]) -> tuple[str, list[str]]:
    """The job's file, and TorchTitan's flags, for flags of 0.2: what is no flag in 0.3 is set in a copy of the file."""
    if IS_0_2:
        return str(job_file), list(titan_flags)
    flags, in_file = [], {}
    for flag in titan_flags:
        key, equals, value = flag.removeprefix("--").partition("=")
        section = key.partition(".")[0]
        if key in NO_FLAGS or section in NO_FLAGS:
            in_file[key] = value
        else:
            plain = key.replace("no-", "").replace("-", "_")
            *sections, name = name_of(plain).split(".")
            name = f"no-{name}" if ".no-" in key else name
            flags.append(f"--{'.'.join([*sections, name])}{equals}{value}")
    if not in_file:
        return str(job_file), flags
    job = tomllib.loads(job_file.read_text())
    for key, value in in_file.items():
        section, _, name = key.partition(".")
        job.setdefault(section, {})[name] = value if not value.replace(".", "").isdigit() else float(value)
    lines = []
    for section, values in job.items():
        lines += [f"[{section}]", *(f"{name} = {toml(value)}" for name, value in values.items())]
    changed = job_file.with_name("job-changed.toml")
    changed.write_text("\n".join(lines))
    return str(changed), flags


def toml(value: Any) -> str:
    """A value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
