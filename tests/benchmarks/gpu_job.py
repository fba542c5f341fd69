"""One run of `tests.benchmarks.gpu`: torchrun -m tests.benchmarks.gpu_job LOADER.toml TEXT.jsonl [TORCHTITAN FLAGS]

One trainer gets batches from several sources, which take turns. So all else is the same for each of them: the model,
what is compiled, the trainer, its metrics. A turn is as many windows of `metrics.log_freq` steps as `TURN` says.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from examples.mosaic_streaming.config.files import LoaderFile, read_toml
from examples.mosaic_streaming.config.plan import Plan
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.titan.v0_2.load import load_job_config
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry

cpu.prepare_torchtitan()
import_llm_foundry()  # as training does: without the packages that it never uses

import torch
from torch import Tensor
from torchtitan.hf_datasets import text_datasets
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.train import Trainer

from examples.mosaic_streaming.batch import TitanBatch
from examples.mosaic_streaming.titan.loaded import LoadedJob
from examples.mosaic_streaming.titan.loaders import Loaders
from examples.mosaic_streaming.titan.v0_2.models import base_spec
from examples.mosaic_streaming.titan.v0_2.trainer import mosaic_spec
from examples.mosaic_streaming.train import run
from tests.benchmarks.gpu_figures import TURN, turns
from tests.benchmarks.jsonl import name_jsonl

FLAVORS = {
    # The shape of Llama 3.2 1B, but for a narrower feed-forward and an output matrix of its own: 1.25 B parameters.
    "1B": TransformerModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, rope_theta=500000)
}


class InTurns:
    """A loader whose batches come from our loader, from TorchTitan's and from memory, in turns of so many batches."""

    def __init__(self, ours: Any, text: Any, turn: int) -> None:
        self._ours, self._text, self._turn = ours, text, turn

    def __iter__(self) -> Iterator[TitanBatch]:
        ours = iter(self._ours)
        ways: dict[str, Iterator[TitanBatch]] = {
            "ours": ours,
            "text": iter(self._text),
            "memory": repeat_batch(next(ours)),
        }
        for way in turns():
            yield from itertools.islice(ways[way], self._turn)

    def __getattr__(self, name: str) -> Any:
        """What `train.run` and the trainer ask of our loader besides."""
        return getattr(self._ours, name)


def repeat_batch(batch: TitanBatch) -> Iterator[TitanBatch]:
    """Yield one batch without end: what training does when data costs nothing.

    The dict is a new one each time, as the trainer puts its tensors on the GPU in it.
    """

    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    inputs, labels = {key: pin(value) for key, value in batch[0].items()}, pin(batch[1])
    while True:
        yield dict(inputs), labels


def bench_spec(name: str, loaders: Loaders) -> TrainSpec:
    """A Mosaic spec with TorchTitan's own metrics, and loaders that take turns."""
    spec = mosaic_spec(base_spec(name), loaders)
    build_ours: Any = spec.build_dataloader_fn

    def build_in_turns(**arguments: Any) -> Any:
        text = text_datasets.build_text_dataloader(**arguments)
        return InTurns(build_ours(**arguments), text, TURN * arguments["job_config"].metrics.log_freq)

    return dataclasses.replace(spec, build_dataloader_fn=build_in_turns, build_metrics_processor_fn=None)


def main() -> None:
    """Register the spec and train."""
    channel = AbortChannel()
    loader_path, texts, *titan_flags = sys.argv[1:]
    llama3_args.update(FLAVORS)
    with channel.report_errors_once():
        titan_flags += [f"--training.dataset={name_jsonl()}", f"--training.dataset_path={texts}"]
        job_config = load_job_config(titan_flags)
        loader = Plan.of(LoaderFile(read_toml(loader_path), loader_path))
        job = LoadedJob(job_config, loader, None, False, job_config.job.dump_folder, "", {})
        register_train_spec(job_config.model.name, bench_spec(job_config.model.name, Loaders(job, channel)))
        run(job, channel, lambda job, channel: Trainer(job.job_config))


if __name__ == "__main__":
    main()
