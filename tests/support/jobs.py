"""Whole runs of `train.main` with TorchTitan's debug model, in forked ranks: their files, flags and logs."""

import multiprocessing
import re
from pathlib import Path

import pytest
from torchtitan.train import Trainer

from examples.mosaic_streaming.train import main
from tests.support.ranks import Rank, run_ranks
from tests.support.streams import SEQ_LEN, write_stream
from tests.support.titan import spell

SAVE = ("--checkpoint.enable", "--training.steps=12", "--checkpoint.interval=1", "--training.global_batch_size=8")
"""64 of the stream's 100 samples are an epoch, of 8 steps."""

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "gradient accumulation": (1, ["--training.local_batch_size=1"]),
    "FSDP 2": (2, ["--training.local_batch_size=2"]),
    "FSDP 2, accumulation": (2, ["--training.local_batch_size=1"]),
    "DDP 2": (2, ["--training.local_batch_size=2", "--parallelism.data_parallel_replicate_degree=2"]),
    "TP 2": (2, ["--training.local_batch_size=4", "--parallelism.tensor_parallel_degree=2"]),
    "PP 2": (2, ["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=2"]),
    "PP 2 x FSDP 2": (4, ["--training.local_batch_size=2", "--parallelism.pipeline_parallel_degree=2"]),
    "FSDP 2 x TP 2": (4, ["--training.local_batch_size=2", "--parallelism.tensor_parallel_degree=2"]),
    "HSDP 2 x 2": (4, ["--training.local_batch_size=1", "--parallelism.data_parallel_replicate_degree=2"]),
}

JOB = f"""
[model]
name = "llama3_mosaic"
flavor = "debugmodel"
hf_assets_path = "tests/assets/tokenizer"
[training]
local_batch_size = 2
global_batch_size = 4
seq_len = {SEQ_LEN}
steps = 4
mixed_precision_param = "float32"
[lr_scheduler]
warmup_steps = 2
[checkpoint]
last_save_model_only = false
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
disable_color_printing = true
"""


def write_files(folder: Path) -> Path:
    """A folder with `job.toml`, `loader.toml` and their stream."""
    write_stream(folder / "stream", samples=100)
    (folder / "job.toml").write_text(f'[job]\ndump_folder = "{folder}/outputs"\n' + JOB)
    write_loader(folder, folder / "stream")
    return folder


def write_loader(files: Path, stream: Path, num_workers: int = 0) -> None:
    """Write `loader.toml` for a stream."""
    (files / "loader.toml").write_text(
        f'name = "text"\nnum_workers = {num_workers}\n[dataset]\nlocal = "{stream}"\nshuffle = true\n'
        "num_canonical_nodes = 64\n"
    )


def command(files: Path, *titan_flags: str) -> list[str]:
    """The arguments of `train.main`, for flags of TorchTitan 0.2."""
    job, flags = spell(files / "job.toml", titan_flags)
    return ["--config", job, "--mosaic-config", f"{files}/loader.toml", "--", *flags]


def train(files: Path, *titan_flags: str, world_size: int = 1, nodes: int = 1) -> list[Rank]:
    """Run in ranks that all have to succeed."""
    ranks = run_ranks(lambda: main(command(files, *titan_flags)), world_size, nodes=nodes)
    assert [rank.code for rank in ranks] == [0] * world_size, "\n".join(rank.output for rank in ranks)
    return ranks


def losses(log: str) -> dict[int, float]:
    """The losses in a log, by step."""
    return {int(step): float(loss) for step, loss in re.findall(r"(?<!validate )step: +(\d+) .*?loss: +([\d.]+)", log)}


def logged(ranks: list[Rank]) -> dict[int, float]:
    """The losses of a run by step; the first stages of a pipeline don't know them."""
    return next(found for rank in reversed(ranks) if (found := losses(rank.output)))


def tell_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print at the end of `Trainer.close` whether dataloader workers live on."""
    close = Trainer.close

    def close_and_tell(self: Trainer) -> None:
        close(self)
        print(f"closed, {len(multiprocessing.active_children())} workers")

    monkeypatch.setattr(Trainer, "close", close_and_tell)
