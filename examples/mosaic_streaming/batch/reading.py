"""Makes batches in a loader's workers, and takes them in the training process.

One collator serves every loader: llm-foundry's, without the work that only Composer needs. llm-foundry 0.22.0 counts
tokens row by row, each count a tensor of its own, casts each text sample separately, and copies ids as labels
(data/utils.py, data/text_data.py). Without workers, this takes most of a loader's time. With workers, passing so many
tensors between processes does.

Whatever goes wrong reaches the training process as a DataError.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, cast

import numpy as np
import torch
from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
from llmfoundry.data.packing import BinPackCollator
from llmfoundry.data.text_data import ConcatenatedSequenceCollatorWrapper
from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from examples.mosaic_streaming.batch.workers import Handed, Slots, WorkerContext
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling import Order, stream_numbers
from examples.mosaic_streaming.shards import CheckedDataset, as_data_error
from examples.mosaic_streaming.upstream.torchelastic import SIGNALS
from examples.mosaic_streaming.upstream.workers import prepare_worker, shut_down_workers

DROPPED_TOKENS, PACKED_TOKENS = "dropped_tokens", "packed_tokens"
"""Keys of a packed batch: how many tokens of its samples were dropped, and how many are in its rows."""

SHOWN_SAMPLES = 8  # of a global batch, in a message
WORKER_EXIT_SECONDS = 1.0  # how long to wait for the exit code of a dying worker
EXIT_CODES_OF_SIGNALS = {code for signum in SIGNALS for code in (-signum, 128 + signum)}


class Collator:
    """Makes batches with llm-foundry's collator or a user's; a worker's errors reach the training process."""

    def __init__(self, collate: Callable[[Any], Any], slots: Slots | None = None) -> None:
        self._collate, self.slots = collate, slots
        self.packs = isinstance(collate, BinPackCollator)  # a row holds several samples

    def __call__(self, samples: list[Any]) -> Any:
        """Return a batch; in a worker, it is in a slot if it fits in, and an error takes its place."""
        if (worker := get_worker_info()) is None:
            return self.make_batch(samples)
        try:
            batch = self.make_batch(samples)
            handed = self.slots.write(worker.id, batch) if self.slots and isinstance(batch, Mapping) else None
            return handed or batch
        except Exception as error:
            return as_data_error(error)

    def take(self, batch: Any) -> Mapping[str, Any]:
        """Return a batch that a worker, or this process, has made, with tensors for arrays.

        DataError if it failed, or is no dict.
        """
        if isinstance(batch, Handed):
            assert self.slots
            batch = self.slots.read(batch)
        if isinstance(batch, DataError):
            raise batch
        if not isinstance(batch, Mapping):
            raise DataError(f"A batch of the loader is a {type(batch).__name__}, expected a dict of tensors.")
        return {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()
        }

    def make_batch(self, samples: list[Any]) -> Any:
        """A batch, with token counts if it is packed. Raises DataError if this worker couldn't read a sample."""
        if error := next((sample for sample in samples if isinstance(sample, DataError)), None):
            raise error
        batch = self._collate(samples)
        if isinstance(packer := self._collate, BinPackCollator):
            packed, total = packer.n_packed_tokens, packer.n_total_tokens
            packer.n_packed_tokens = packer.n_total_tokens = 0  # it would add them up over all batches
            batch |= {DROPPED_TOKENS: total - packed, PACKED_TOKENS: packed}
        return batch


def collate_rows(collate: DataCollatorForLanguageModeling, samples: Sequence[Any]) -> Any:
    """Stack token arrays of one length as `input_ids` alone; `collate`, llm-foundry's, pads or stacks all else."""
    if isinstance(samples[0], dict):  # tokenized on the fly
        return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
    if len({sample.shape for sample in samples}) > 1 or samples[0].ndim != 1:
        return collate([torch.from_numpy(sample.astype(np.int64)) for sample in samples])
    is_narrow = all(np.can_cast(dtype, np.int32) for dtype in {sample.dtype for sample in samples})
    dtype = np.int32 if is_narrow else np.int64  # types that torch can compute with
    rows = np.concatenate(samples, dtype=dtype, casting="unsafe").reshape(len(samples), -1)
    return {"input_ids": torch.from_numpy(rows)}


class PadsThroughArrays:
    """A tokenizer whose batches become arrays first: torch takes three times as long as numpy to read lists."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __reduce__(self) -> Any:  # before `_tokenizer` is there, `__getattr__` would call itself
        return PadsThroughArrays, (self._tokenizer,)

    def pad(self, *args: Any, **settings: Any) -> dict[str, torch.Tensor]:
        """Pad as the tokenizer does. Returns tensors int64 [rows, tokens]."""
        batch = self._tokenizer.pad(*args, **settings | {"return_tensors": "np"})
        return {key: torch.as_tensor(value) for key, value in batch.items()}  # tensors if two loaders share it


def use_fast_collator(loader: DataLoader[Any], is_text: bool) -> None:
    """Give a loader this project's `Collator`, which keeps inside it what isn't llm-foundry's own.

    ConfigError if a loader that a user has registered packs, and carries samples over to the next batch.
    """
    dataset, collate = loader.dataset, cast(Any, loader.collate_fn)
    assert isinstance(dataset, CheckedDataset)
    if type(collate) is LossGeneratingTokensCollatorWrapper:
        collate = collate.base_collator
    has_documents = type(collate) is ConcatenatedSequenceCollatorWrapper
    base = collate.base_collator if has_documents else collate
    if is_text and type(base) is DataCollatorForLanguageModeling and not base.mlm:
        dataset.keep_dtype = True
        rows = functools.partial(collate_rows, base)
        if has_documents:
            collate.base_collator = rows
        else:
            collate = rows
    packed = collate.base_collator if isinstance(collate, BinPackCollator) else collate
    if type(packed) is Seq2SeqFinetuningCollator:
        packed.tokenizer = cast(Any, PadsThroughArrays(packed.tokenizer))
    if isinstance(collate, BinPackCollator) and collate.max_leftover_bins_to_keep != 0:
        raise ConfigError(
            "The loader's BinPackCollator carries samples that didn't fit over to its next batch, and a restart loses "
            "them. Give it max_leftover_bins_to_keep=0."
        )
    slots = None
    if loader.num_workers and loader.multiprocessing_context is None:
        loader.multiprocessing_context = WorkerContext()
        slots = Slots(loader.num_workers, loader.prefetch_factor or 1)
    loader.collate_fn = Collator(collate, slots)


class Batches:
    """The batches of a loader, epoch by epoch. Messages name `source`, the streams and the rank, and `config_file`."""

    def __init__(self, loader: DataLoader[Any], source: str, config_file: str) -> None:
        self._loader, self._source, self._config_file = loader, source, config_file
        self._collator = cast(Collator, loader.collate_fn)
        self._batches: Iterator[Any] | None = None

    def begin(self) -> None:
        """Begin an epoch at the dataset's position. Persistent workers live on."""
        self._batches = None  # ends other workers before new ones write into their slots
        self._batches = iter(self._loader)

    def take(self, count: int) -> list[Mapping[str, Any]]:
        """Return the next `count` batches, or fewer at an epoch's end; DataError if a sample, batch or worker fails."""
        assert self._batches is not None
        try:
            return [self._collator.take(batch) for batch in itertools.islice(self._batches, count)]
        except Exception as error:
            raise DataError(self.lost_workers() or f"{as_data_error(error)} {self._source}") from error

    def lost_workers(self) -> str:
        """Say which dataloader workers have died, and how; signals that end the whole job don't count."""
        workers = getattr(self._batches, "_workers", [])
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD says less
            ended = connection.wait([worker.sentinel for worker in workers], WORKER_EXIT_SECONDS)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()  # its connections close before it has an exit code
        lost = [
            f"Dataloader worker {index} (pid {worker.pid}) ended with exit code {worker.exitcode}."
            for index, worker in enumerate(workers)
            if worker.exitcode not in {None, 0} | EXIT_CODES_OF_SIGNALS
        ]
        hint = "-9 mostly means out of memory: lower num_workers, prefetch_factor or dataset.predownload in"
        return " ".join([*lost, hint, f"{self._config_file}."]) if lost else ""

    def close(self) -> None:
        batches, self._batches = self._batches, None
        shut_down_workers(batches, close_pipe=isinstance(self._loader.multiprocessing_context, WorkerContext))


def read_in_workers(
    make_batch: Callable[[Any], Any], ids: Sequence[Any], size: int, workers: int, source: str, config_file: str
) -> Iterator[Mapping[str, Any]]:
    """Yield what workers make of `size` ids at a time; a process that has fetched shards must not be forked later.

    The loader has a generator of its own: from torch's default one, which also draws the model's weights, rank 0 alone
    would draw a number.
    """
    loader: DataLoader[Any] = DataLoader(
        cast(Dataset[Any], ids),
        size,
        num_workers=workers,
        collate_fn=Collator(make_batch, Slots(workers, 2)),
        prefetch_factor=2,
        multiprocessing_context=WorkerContext(),
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),
    )
    with contextlib.closing(Batches(loader, source, config_file)) as batches:
        batches.begin()
        while batch := batches.take(1):
            yield batch[0]


def no_loss_token_error(
    dataset: CheckedDataset, order: Order, stage: int, epoch: int, sample_in_epoch: int
) -> DataError:
    """Make the error for the global batch that begins at a sample of an epoch; it names samples and streams."""
    samples = order.samples(dataset, epoch, sample_in_epoch + np.arange(order.global_batch_size))
    told, of_stage = ", ".join(map(str, samples[:SHOWN_SAMPLES])), f" --stage {stage}" if stage > 1 else ""
    more = f" and {samples.size - SHOWN_SAMPLES:,} more" if samples.size > SHOWN_SAMPLES else ""
    streams = [dataset.streams[number].label for number in np.unique(stream_numbers(dataset, samples))]
    return DataError(
        f"The global batch at sample {sample_in_epoch:,} of epoch {epoch} has no loss token: all its labels are -100. "
        f"It is made of samples {told}{more} of {', '.join(streams)}. `preview show --sample {samples[0]}{of_stage}` "
        "shows one. Remove such samples, or raise training.global_batch_size, so that others are in a batch with them."
    )
