"""A job's data without the job: its streams in their order, in any layout, from one process on any machine.

Caches of jobs are neither used nor changed: what has to be fetched or unpacked goes into a folder of its own, which is
removed.
"""

import contextlib
import copy
import dataclasses
import errno
import fcntl
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.world import World
from torchtitan.config import JobConfig
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch.collate import to_tensors
from examples.mosaic_streaming.batch.convert import check_keys, is_padding
from examples.mosaic_streaming.batch.first_samples import look_at_samples
from examples.mosaic_streaming.build import check_memory, settle
from examples.mosaic_streaming.checkpoint.history import History, Segment
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.loader import WITHOUT_WORKERS, Config, is_local, streams_of, take_out_token_ids
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.store import new_job_id
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.rounds import resolve_validation
from examples.mosaic_streaming.sampling.order import Order
from examples.mosaic_streaming.sampling.placement import deal, dp_rank_of, dp_ranks_per_node, sample_world
from examples.mosaic_streaming.shards.prepare import get_index, make_stream, stream_label
from examples.mosaic_streaming.streams import Streams, batch_format, build_loader, fill_in_ratio, open_streams
from examples.mosaic_streaming.titan.v0_2 import spec
from examples.mosaic_streaming.titan.v0_2.job_config import check_job, import_custom, parallel_dims
from examples.mosaic_streaming.tokenizer import build_tokenizer
from examples.mosaic_streaming.upstream.shared_memory import remove_stale

OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""What torchrun tells its processes; here, each of them would be wrong."""

PREFIX, LOCK = "mosaic_streaming-preview-", "in_use"
"""Of temporary folders: how their names begin, and the file in them that their process locks."""

GPUS = 8
"""Of a machine, unless the user says another number."""


@dataclass(frozen=True)
class Layout:
    """The ranks of a job.

    Attributes:
        world_size: processes.
        ranks_per_node: processes on each machine.
        degrees: of parallelism: pp, dp_replicate, dp_shard, cp, tp.
    """

    world_size: int
    ranks_per_node: int
    degrees: Mapping[str, int]

    @property
    def dp_world_size(self) -> int:
        """Size of TorchTitan's batch mesh."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world_size // self.ranks_per_node

    def readers(self) -> list[list[int]]:
        """The ranks that read what each dp rank reads."""
        peers = self.degrees["cp"] * self.degrees["tp"]
        found: list[list[int]] = [[] for _ in range(self.dp_world_size)]
        for rank in range(self.world_size):
            found[dp_rank_of(rank, self.dp_world_size, peers)].append(rank)
        return found

    def world(self) -> World:
        """The world in which samples are shared out, as its first dp rank sees it."""
        dp, pp = self.dp_world_size, self.degrees["pp"]
        return sample_world(0, dp, dp_ranks_per_node(self.world_size, dp, pp, self.ranks_per_node))


class Place(NamedTuple):
    """Where a sample lies: its stream, its number there, its shard's file and its number in that."""

    stream: str
    sample_of_stream: int
    shard: str
    sample_of_shard: int


class NoRowError(DataError):
    """The loader's collator makes no row of a sample; training would stop there."""


@dataclass
class Offline:
    """Streams of a job that isn't running.

    Attributes:
        job_config: the whole job.
        layout: its ranks.
        given: the loader's file, as it was read.
        config: the resolved loader configuration that a job would have; `streams` has other caches.
        streams: ready to be read.
        tokenizer: the model's.
        folder: of this process, for what it fetches.
        validation: the file of the validation streams, where the job reads them.
        section: of the job config that has their lengths.
    """

    job_config: JobConfig
    layout: Layout
    given: LoaderFile
    config: Config
    streams: Streams
    tokenizer: PreTrainedTokenizerBase
    folder: str
    validation: LoaderFile | None
    section: str = "training"
    _epoch: int = -1
    _in_order: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch that is read from its beginning."""
        return self.streams.order.left(0) // self.streams.order.global_batch_size

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The first sample of each stream, int64 [streams]."""
        return self.streams.dataset.sample_offset_per_stream

    def from_beginning(self) -> History:
        """What a run reads that begins with the present settings, and goes on with them."""
        order = self.streams.order
        return History(order, (Segment(0, 0, 0, order.global_batch_size),))

    def in_order(self, epoch: int) -> NDArray[np.int64]:
        """Ids of the samples of an epoch, int64 [samples], also of those that fill no global batch; keeps the last.

        Raises:
            ConfigError: this machine's memory is too small for it.
        """
        if self._epoch != epoch:
            check_memory(self.streams.dataset, self.streams.path)
            order = dataclasses.replace(self.streams.order, global_batch_size=1, local_batch_size=1)
            self._epoch = epoch
            self._in_order = order(self.streams.dataset, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        return self._in_order

    def global_batch(self, step: int, history: History | None = None) -> NDArray[np.int64]:
        """What each dp rank of this layout reads in a step.

        Args:
            step: counted from 1.
            history: of the run; without, it has begun with the present settings.

        Returns:
            int64 [dp ranks, batches, samples of a batch].

        Raises:
            ConfigError: the step is not known, or this layout can't share out its global batch.
        """
        order, dp = self.streams.order, self.layout.dp_world_size
        part = (history or self.from_beginning()).batch(step)
        if part.global_batch_size % (order.local_batch_size * dp):
            raise ConfigError(
                f"Step {step} has a global batch of {part.global_batch_size} samples, which {dp} dp ranks with "
                f"batches of {order.local_batch_size} can't share. Give the run's own --world-size and "
                "training.local_batch_size of that time."
            )
        samples = self.in_order(part.epoch)[part.begin : part.end]
        return deal(samples, self.layout.world(), order.local_batch_size, order.together).reshape(
            dp, -1, order.local_batch_size
        )

    def look(self) -> list[str]:
        """What a start would warn of in the first samples.

        Raises:
            ConfigError, DataError: it would refuse them.
        """
        streams = self.streams
        return look_at_samples(streams.loader, streams.form, streams.config, streams.path, self.tokenizer, self.section)

    def stream_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the streams that samples are of, of the same shape."""
        return np.searchsorted(self.offsets, samples, side="right") - 1

    def place(self, sample: int) -> Place:
        """Where a sample lies.

        Raises:
            ConfigError: there is no such sample.
        """
        dataset = self.streams.dataset
        if not 0 <= sample < dataset.num_samples:
            raise ConfigError(f"Sample {sample}: the streams have samples 0 to {dataset.num_samples - 1:,}.")
        stream = int(self.stream_of(np.array(sample)))
        shard, index = (int(number) for number in dataset.spanner[sample])
        files = [raw.basename for raw, _ in dataset.shards[shard].file_pairs]
        file = next(name for name in files if not name.endswith(".meta"))  # which JSON and CSV have beside their data
        return Place(self.streams.names[stream], sample - int(self.offsets[stream]), file, index)

    def collate(self, samples: Sequence[int]) -> Mapping[str, Any]:
        """The batch that llm-foundry's collator makes of samples.

        Raises:
            DataError: one can't be read.
            NoRowError: one makes no row.
        """
        collate: Any = self.streams.loader.collate_fn
        read = [self.read(sample) for sample in samples]
        try:
            batch: Mapping[str, Any] = collate(read)
        except Exception as error:
            for sample in samples if len(samples) > 1 else []:
                self.collate([sample])  # which one is it?
            raise NoRowError(f"Sample {samples[0]} makes no row, and training would stop there: {error}") from error
        batch = to_tensors(batch)
        check_keys(batch, self.streams.form)
        return batch

    def read(self, sample: int) -> Any:
        """A sample as llm-foundry reads it.

        Raises:
            DataError: it can't be read.
            NoRowError: llm-foundry refuses what was read.
        """
        dataset = self.streams.dataset
        try:
            return dataset[sample]
        except DataError as error:
            try:
                dataset.get_item(sample)
            except Exception:
                raise error from None  # its file is at fault
            raise NoRowError(f"Sample {sample} makes no row, and training would stop there: {error}") from error

    def tokens(self, sample: int) -> list[int]:
        """The ids of a sample that a row has room for, without padding.

        Raises:
            DataError: it can't be read.
            NoRowError: it makes no row.
        """
        batch = self.collate([sample])
        ids = batch["input_ids"][0]
        padding = is_padding(batch["input_ids"], batch.get("attention_mask"), self.streams.form)
        return [int(token) for token in (ids if padding is None else ids[~padding[0]])]

    def text(self, sample: int) -> str:
        """What `tokens` returns, decoded."""
        return self.decode(self.tokens(sample))

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, as it is."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@contextlib.contextmanager
def open_offline(
    job_config: JobConfig,
    train: LoaderFile,
    validation: LoaderFile | None,
    world_size: int,
    ranks_per_node: int | None,
    channel: AbortChannel,
) -> Iterator[Offline]:
    """Within it, the streams of a job can be read.

    Args:
        job_config: the whole job.
        train: the loader's configuration.
        validation: that of the validation loader.
        world_size: processes of the job.
        ranks_per_node: processes on each machine; without, up to 8.
        channel: of this process.

    Raises:
        ConfigError: the job would not start with this configuration, or not on so many ranks.
        DataError: an index can't be had, or can't be believed.
    """
    for name in OF_A_JOB:
        os.environ.pop(name, None)
    layout = layout_of(job_config, world_size, ranks_per_node)
    check_job(job_config, validation is not None, world_size)
    import_custom(job_config)
    spec.register(job_config.model.name, train, None, channel)
    dp_world_size, titan_tokenizer = layout.dp_world_size, build_tokenizer(job_config)
    config, tokenizer, global_batches = settle(job_config, train, titan_tokenizer, dp_world_size, world_size)
    validation = validation if job_config.validation.enable else None
    if validation:
        resolve_validation(job_config, world_size // dp_world_size, validation, train)
    remove_stale()
    with own_folder(channel) as folder:
        own = read_through(folder, config, train.path)
        fill_in_ratio(job_config, own, train.path, tokenizer, lambda choose: choose())
        config["dataset"] |= {key: own["dataset"][key] for key in ("packing_ratio",) if key in own["dataset"]}
        streams = open_streams(
            job_config,
            own,
            train.path,
            titan_tokenizer,
            tokenizer,
            new_job_id(),
            reader="The preview",
            global_batches=global_batches,
            may_cut="max_seq_len" in train.config["dataset"],
        )
        streams.dataset._set_shuffle_block_size(World(1, 1, 1, 0))  # as its first iteration would
        yield Offline(job_config, layout, train, config, streams, tokenizer, folder, validation)


def open_validation(offline: Offline) -> Offline | None:
    """The validation streams of a job, if it has any; samples of theirs have ids of their own.

    Raises:
        ConfigError: llm-foundry or streaming refuses them.
        DataError: an index can't be had, or can't be believed.
    """
    job_config, file = offline.job_config, offline.validation
    if not file:
        return None
    validation, dp = job_config.validation, offline.layout.dp_world_size
    config = resolve_validation(job_config, offline.layout.world_size // dp, file, offline.given)
    take_out_token_ids(config, file.path, offline.tokenizer)
    own = read_through(os.path.join(offline.folder, "validation"), config, file.path)
    rows, may_cut = validation.local_batch_size, "max_seq_len" in file.config["dataset"]
    loader = build_loader(own, file.path, offline.tokenizer, rows, new_job_id(), may_cut)
    form = batch_format(
        job_config, own, file.path, offline.tokenizer, "The preview", rows=rows, seq_len=validation.seq_len
    )
    assert isinstance(loader.dataset, StreamingDataset)
    order = Order("random", rows * dp, rows, loader.dataset.epoch_size)
    streams = Streams(own, file.path, loader, order, form, {})
    return dataclasses.replace(
        offline, given=file, config=config, streams=streams, validation=None, section="validation"
    )


def layout_of(job_config: JobConfig, world_size: int, ranks_per_node: int | None) -> Layout:
    """The layout that TorchTitan makes of a job's degrees.

    Raises:
        ConfigError: they don't fit so many ranks.
    """
    if ranks_per_node is None:
        ranks_per_node = world_size if world_size <= GPUS else math.gcd(world_size, GPUS)
    if world_size < 1 or ranks_per_node < 1 or world_size % ranks_per_node:
        raise ConfigError(
            f"--world-size {world_size} with --ranks-per-node {ranks_per_node}: expected a multiple of the second."
        )
    dims = parallel_dims(job_config, world_size)
    degrees = {name: getattr(dims, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    return Layout(world_size, ranks_per_node, degrees)


@contextlib.contextmanager
def own_folder(channel: AbortChannel) -> Iterator[str]:
    """A temporary folder of this process; those that killed ones of this user have left are removed.

    Raises:
        ConfigError: there can be none.
    """
    try:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                remove_left(left)
        folder = tempfile.mkdtemp(prefix=PREFIX)
    except OSError as error:
        raise ConfigError(
            f"No temporary folder can be made ({error}): set TMPDIR to a place with some room."
        ) from error
    with open(f"{folder}/{LOCK}.part", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.rename(lock.name, f"{folder}/{LOCK}")  # nobody sees it unlocked
        try:
            try:
                yield folder
            finally:
                channel.begin_shutdown()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left(folder: Path) -> None:
    """Remove a temporary folder of this user's whose process has ended; anybody may have put anything in its place.

    Raises:
        OSError: it is no such folder, or its process lives.
    """
    with contextlib.ExitStack() as stack:

        def open_own(name: str | Path, flags: int, within: int | None = None) -> int:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=within)
            stack.callback(os.close, file)
            if os.fstat(file).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "another user's", str(name))
            return file

        lock = open_own(LOCK, 0, within=open_own(folder, os.O_DIRECTORY))
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def read_through(folder: str, config: Config, path: str) -> Config:
    """A configuration that reads the same streams in this process, with their indexes fetched.

    Streams in folders of this machine are read where they lie, if nothing has to be unpacked beside them, nor evicted
    there; the others through caches in a folder.

    Raises:
        DataError: an index can't be had, or can't be believed.
    """
    config = copy.deepcopy(config) | WITHOUT_WORKERS
    dataset = config["dataset"]
    dataset["replication"] = 1
    for number, (name, settings) in enumerate(streams_of(dataset).items()):
        local, source = is_local(settings), settings.get("remote") or settings["local"]
        source = os.path.abspath(source) if local else source
        settings |= {"remote": source, "local": os.path.join(folder, str(number))}
        stream = make_stream(settings, dataset, stream_label(name, path))
        parts = get_index(stream, bool(dataset.get("allow_unsafe_types")))
        if local and not any(part.packed for part in parts) and not dataset.get("cache_limit"):
            settings["local"] = source
    return config
