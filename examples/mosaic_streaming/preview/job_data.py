"""Opens a job's data without the job: its streams in their order, for any layout, in one process on any machine.

The caches of jobs are neither used nor changed. What has to be fetched or unpacked goes into a temporary folder.
"""

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.world import World
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.batch import check_first_samples, check_keys, is_padding, to_tensors
from examples.mosaic_streaming.checkpoint import History, Segment
from examples.mosaic_streaming.config import (
    WITHOUT_WORKERS,
    BatchShape,
    Job,
    LoaderFile,
    ResolvedLoader,
    is_local,
    resolve,
    streams_of,
    without_token_ids,
)
from examples.mosaic_streaming.dataloader import (
    OpenLoader,
    batch_spec,
    fill_in_packing_ratio,
    open_loader,
    open_streams,
)
from examples.mosaic_streaming.distributed import AbortChannel, new_job_id
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.preview.folder import own_folder
from examples.mosaic_streaming.sampling import Order, assign_to_ranks, check_memory
from examples.mosaic_streaming.shards import get_index, make_stream
from examples.mosaic_streaming.tokenizer import build_tokenizer, build_transformers_tokenizer, check_tokenizer
from examples.mosaic_streaming.upstream.shared_memory import remove_stale
from examples.mosaic_streaming.validator import resolve_validation

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Environment variables that torchrun sets for its processes. Here, each of them would be wrong."""

GPUS = 8
"""The ranks of a machine, unless the user gives another number."""


class SampleLocation(NamedTuple):
    """Where a sample is stored: its stream, its number in that, its shard's file, and its number in that."""

    stream: str
    sample_of_stream: int
    shard: str
    sample_of_shard: int


class NoRowError(DataError):
    """The loader's collator makes no row of a sample. Training would stop there."""


@dataclass
class JobData:
    """The streams of a job that isn't running.

    Attributes:
        job: the job that would read them.
        job_settings: the settings of its job config, with their owners.
        given: the loader's file, as it was read.
        config: the loader configuration that the job would have. `opened` has other caches.
        opened: the open streams.
        tokenizer: the model's tokenizer, as transformers has it.
        folder: the temporary folder of this process.
        shape: the size of the model's batches.
        validation: the file and the configuration of the validation loader, if the job has one.
    """

    job: Job
    job_settings: list[dict[str, Any]]
    given: LoaderFile
    config: ResolvedLoader
    opened: OpenLoader
    tokenizer: PreTrainedTokenizerBase
    folder: str
    shape: BatchShape
    validation: tuple[LoaderFile, ResolvedLoader] | None
    _epoch: int = -1
    _in_order: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch that is read from its beginning."""
        return self.opened.order.remaining(0) // self.opened.order.global_batch_size

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The first sample of each stream, int64 [streams]."""
        return self.opened.dataset.sample_offset_per_stream

    def from_beginning(self) -> History:
        """The history of a run that begins with the present settings, and keeps them."""
        order = self.opened.order
        return History(order, (Segment(0, 0, 0, order.global_batch_size),))

    def in_order(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch in order, int64 [samples], with those that fill no global batch. The last is kept.

        Raises:
            ConfigError: this machine's memory is too small.
        """
        if self._epoch != epoch:
            check_memory(self.opened.dataset.epoch_size, self.opened.config.source)
            order = dataclasses.replace(self.opened.order, global_batch_size=1, local_batch_size=1)
            self._epoch = epoch
            self._in_order = order(self.opened.dataset, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        return self._in_order

    def global_batch(self, step: int, history: History | None = None) -> NDArray[np.int64]:
        """The samples that each dp rank reads in a step.

        Args:
            step: the step, counted from 1.
            history: the run's history; by default, it has begun with the present settings.

        Returns:
            int64 [dp ranks, micro-batches, samples of a micro-batch].

        Raises:
            ConfigError: the step is not known, or its global batch can't be split for this layout.
        """
        order, dp = self.opened.order, self.job.layout.dp_world_size
        part = (history or self.from_beginning()).batch(step)
        if part.global_batch_size % (order.local_batch_size * dp):
            raise ConfigError(
                f"Step {step} has a global batch of {part.global_batch_size} samples, which {dp} dp ranks with "
                f"batches of {order.local_batch_size} can't share. Give the run's own --world-size and "
                "training.local_batch_size of that time."
            )
        samples = self.in_order(part.epoch)[part.begin : part.end]
        return assign_to_ranks(samples, self.job.layout.world(), order.local_batch_size, order.group_size).reshape(
            dp, -1, order.local_batch_size
        )

    def check_first_samples(self) -> list[str]:
        """Check the first samples as a start does, and return its warnings.

        Raises:
            ConfigError, DataError: a start would refuse them.
        """
        opened = self.opened
        return check_first_samples(opened.loader, opened.spec, opened.config, self.tokenizer, self.shape)

    def stream_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the samples' streams, of the same shape."""
        return np.searchsorted(self.offsets, samples, side="right") - 1

    def locate(self, sample: int) -> SampleLocation:
        """Say where a sample is stored; raise ConfigError if there is no such sample."""
        dataset = self.opened.dataset
        if not 0 <= sample < dataset.num_samples:
            raise ConfigError(f"Sample {sample}: the streams have samples 0 to {dataset.num_samples - 1:,}.")
        stream = int(self.stream_of(np.array(sample)))
        shard, index = (int(number) for number in dataset.spanner[sample])
        files = [raw.basename for raw, _ in dataset.shards[shard].file_pairs]
        file = next(name for name in files if not name.endswith(".meta"))  # which JSON and CSV have beside their data
        return SampleLocation(self.opened.names[stream], sample - int(self.offsets[stream]), file, index)

    def collate(self, samples: Sequence[int]) -> Mapping[str, Any]:
        """Make the batch that llm-foundry's collator makes of samples.

        Raises:
            DataError: a sample can't be read.
            NoRowError: a sample makes no row.
        """
        collate: Any = self.opened.loader.collate_fn
        read = [self.read(sample) for sample in samples]
        try:
            batch: Mapping[str, Any] = collate(read)
        except Exception as error:
            for sample in samples if len(samples) > 1 else []:
                self.collate([sample])  # which one is it?
            raise NoRowError(f"Sample {samples[0]} makes no row, and training would stop there: {error}") from error
        batch = to_tensors(batch)
        check_keys(batch, self.opened.spec)
        return batch

    def read(self, sample: int) -> Any:
        """Read a sample as llm-foundry reads it.

        Raises:
            DataError: it can't be read.
            NoRowError: llm-foundry refuses what was read.
        """
        dataset = self.opened.dataset
        try:
            return dataset[sample]
        except DataError as error:
            try:
                dataset.get_item(sample)
            except Exception:
                raise error from None  # its file is at fault
            raise NoRowError(f"Sample {sample} makes no row, and training would stop there: {error}") from error

    def tokens(self, sample: int) -> list[int]:
        """The ids of a sample that fit into a row, without padding; errors are those of `collate`."""
        batch = self.collate([sample])
        ids = batch["input_ids"][0]
        padding = is_padding(batch["input_ids"], batch.get("attention_mask"), self.opened.spec)
        return [int(token) for token in (ids if padding is None else ids[~padding[0]])]

    def text(self, sample: int) -> str:
        """The text of `tokens`."""
        return self.decode(self.tokens(sample))

    def decode(self, ids: list[int]) -> str:
        """Decode ids, without cleaning up spaces."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@contextlib.contextmanager
def open_job_data(
    job_config: Any,
    job_settings: list[dict[str, Any]],
    train: LoaderFile,
    validation: LoaderFile | None,
    world_size: int,
    ranks_per_node: int | None,
    channel: AbortChannel,
) -> Iterator[JobData]:
    """A context in which the streams of a job can be read.

    Args:
        job_config: TorchTitan's job config.
        job_settings: its settings, with their owners.
        train: the configuration of the training loader.
        validation: the configuration of the validation loader, if there is one.
        world_size: processes of the job.
        ranks_per_node: processes on each machine; by default, up to 8.
        channel: ends this process.

    Raises:
        ConfigError: the job would not start with this configuration, or not on so many ranks.
        DataError: an index is missing or wrong.
    """
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    ranks_per_node = check_ranks(world_size, ranks_per_node)
    titan.check_job(job_config, validation is not None, world_size)
    titan.import_custom(job_config)
    titan.register(job_config.model.name, train, None, channel)
    job = titan.make_job(job_config, world_size, ranks_per_node)
    config = resolve(train, job.training, job.layout.replication)
    titan_tokenizer = build_tokenizer(job.assets)
    tokenizer = build_transformers_tokenizer(job.assets, titan_tokenizer)
    check_tokenizer(titan_tokenizer, job)
    config = without_token_ids(config, tokenizer)
    held_out = (validation, resolve_validation(validation, job, config)) if validation and job.validation else None
    remove_stale()
    with own_folder(channel) as folder:
        own = fill_in_packing_ratio(read_through(folder, config), job, tokenizer, lambda choose: choose())
        if "packing_ratio" in own.dataset:
            config = config.with_settings(packing_ratio=own.dataset["packing_ratio"])
        opened = open_streams(job, own, titan_tokenizer, tokenizer, new_job_id(), "The preview")
        yield JobData(job, job_settings, train, config, opened, tokenizer, folder, job.training, held_out)


def open_validation(data: JobData) -> JobData | None:
    """Open the validation streams of a job, if it has any. Their samples have numbers of their own.

    Raises:
        ConfigError: llm-foundry or streaming refuses them.
        DataError: an index is missing or wrong.
    """
    if not data.validation:
        return None
    assert data.job.validation
    file, config = data.validation
    config, shape = without_token_ids(config, data.tokenizer), data.job.validation.shape
    own = read_through(os.path.join(data.folder, "validation"), config)
    rows = shape.local_batch_size
    loader = open_loader(own, data.tokenizer, rows, new_job_id())
    spec = batch_spec(data.job, shape, own, data.tokenizer, "The preview")
    assert isinstance(loader.dataset, StreamingDataset)
    order = Order("random", rows * data.job.layout.dp_world_size, rows, loader.dataset.epoch_size)
    opened = OpenLoader(own, loader, order, spec, {})
    return dataclasses.replace(data, given=file, config=config, opened=opened, validation=None, shape=shape)


def check_ranks(world_size: int, ranks_per_node: int | None) -> int:
    """Return the processes of each machine; raise ConfigError unless the world size is a multiple of them."""
    if ranks_per_node is None:
        ranks_per_node = world_size if world_size <= GPUS else math.gcd(world_size, GPUS)
    if world_size < 1 or ranks_per_node < 1 or world_size % ranks_per_node:
        raise ConfigError(
            f"--world-size {world_size} with --ranks-per-node {ranks_per_node}: expected a multiple of the second."
        )
    return ranks_per_node


def read_through(folder: str, loader: ResolvedLoader) -> ResolvedLoader:
    """Change a configuration to read the same streams in this process, and fetch their indexes.

    Streams in folders of this machine are read where they are, unless files have to be unpacked or evicted there. All
    others are read through caches in a temporary folder.

    Raises:
        DataError: an index is missing or wrong.
    """
    config = copy.deepcopy(loader.config) | WITHOUT_WORKERS
    dataset = config["dataset"]
    dataset["replication"] = 1
    sections = list(streams_of(dataset).values())
    for number, (settings, label) in enumerate(zip(loader.streams.values(), loader.labels, strict=True)):
        local, source = is_local(settings), settings.get("remote") or settings["local"]
        source = os.path.abspath(source) if local else source
        own = {"remote": source, "local": os.path.join(folder, str(number))}
        parts = get_index(make_stream(settings | own, label), bool(dataset.get("allow_unsafe_types")))
        if local and not any(part.packed for part in parts) and not dataset.get("cache_limit"):
            own["local"] = source
        sections[number] |= own
    return dataclasses.replace(loader, config=config)
