"""One run of `tests.benchmarks.gpu`: torchrun -m tests.benchmarks.gpu_job WAY LOADER.toml TEXT.jsonl [TORCHTITAN FLAGS]

A WAY says where batches come from. All else is the same in each of them: the model, the trainer, its metrics.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from examples.mosaic_streaming.config.files import LoaderFile, read_toml
from examples.mosaic_streaming.config.plan import Plan
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.titan.v0_2.load import load_job_config
from examples.mosaic_streaming.upstream import cpu

cpu.prepare_torchtitan()

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.hf_datasets import text_datasets
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.train import Trainer

from examples.mosaic_streaming.titan.loaded import LoadedJob
from examples.mosaic_streaming.titan.loaders import Loaders
from examples.mosaic_streaming.titan.v0_2.models import base_spec
from examples.mosaic_streaming.titan.v0_2.trainer import mosaic_spec
from examples.mosaic_streaming.train import run
from tests.benchmarks.jsonl import name_jsonl

Builder = Callable[..., Any]
FLAVORS = {
    # The shape of Llama 3.2 1B, but for a narrower feed-forward and an output matrix of its own: 1.25 B parameters.
    "1B": TransformerModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, rope_theta=500000)
}


class InMemory(BaseDataLoader):
    """The first batch of TorchTitan's text loader, again and again: what training does when data costs nothing."""

    def __init__(self, *, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> None:
        training = job_config.training
        texts = text_datasets.HuggingFaceTextDataset(
            training.dataset, training.dataset_path, tokenizer, training.seq_len, dp_rank, dp_world_size, infinite=True
        )
        inputs, labels = default_collate(list(itertools.islice(texts, training.local_batch_size)))
        self._batch: tuple[Tensor, Tensor] = (inputs["input"], labels)
        if torch.cuda.is_available():
            self._batch = (self._batch[0].pin_memory(), self._batch[1].pin_memory())

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield without end; the dict is a new one each time, as the trainer puts its tensors on the GPU in it."""
        tokens, labels = self._batch
        while True:
            yield {"input": tokens}, labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is no position."""


def closable(build: Builder) -> Builder:
    """A loader's builder, for `train.run`, which closes what it has built."""

    def build_closable(**arguments: Any) -> Any:
        loader = build(**arguments)
        loader.close, loader.lost_workers = (lambda: None), (lambda: "")
        return loader

    return build_closable


def bench_spec(name: str, way: str, loaders: Loaders) -> TrainSpec:
    """A Mosaic spec with the flavors of the benchmark, TorchTitan's own metrics, and the loader of one way."""
    spec = base_spec(name)
    spec = mosaic_spec(dataclasses.replace(spec, model_args={**spec.model_args, **FLAVORS}), loaders)
    builders: dict[str, Any] = {
        "mosaic": spec.build_dataloader_fn,
        "text": closable(text_datasets.build_text_dataloader),
        "memory": closable(InMemory),
    }
    return dataclasses.replace(spec, build_dataloader_fn=builders[way], build_metrics_processor_fn=None)


def main() -> None:
    """Register the spec and train."""
    channel = AbortChannel()
    way, loader_path, texts, *titan_flags = sys.argv[1:]
    with channel.report_errors_once():
        titan_flags += [f"--training.dataset={name_jsonl()}", f"--training.dataset_path={texts}"]
        job_config = load_job_config(titan_flags)
        loader = Plan.of(LoaderFile(read_toml(loader_path), loader_path))
        job = LoadedJob(job_config, loader, None, False, job_config.job.dump_folder, "", {})
        spec = bench_spec(job_config.model.name, way, Loaders(job, channel))
        register_train_spec(job_config.model.name, spec)
        run(job, channel, lambda job, channel: Trainer(job.job_config))


if __name__ == "__main__":
    main()
