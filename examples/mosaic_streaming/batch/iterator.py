"""Reading batches: whatever goes wrong is a DataError, and the workers are shut down."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from examples.mosaic_streaming.batch.collate import Collator, to_tensors
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.sampling import Order, stream_numbers
from examples.mosaic_streaming.shards import CheckedDataset, as_data_error
from examples.mosaic_streaming.upstream.torchelastic import SIGNALS
from examples.mosaic_streaming.upstream.workers import prepare_worker, shut_down_workers

SHOWN_SAMPLES = 8  # of a global batch, in a message
WORKER_EXIT_SECONDS = 1.0  # how long to wait for the exit code of a dying worker
EXIT_CODES_OF_SIGNALS = {code for signum in SIGNALS for code in (-signum, 128 + signum)}


class Batches:
    """The batches of a loader, epoch by epoch. Messages name `source`, the streams and the rank, and `config_file`."""

    def __init__(self, loader: DataLoader[Any], source: str, config_file: str) -> None:
        self._loader, self._source, self._config_file = loader, source, config_file
        self._batches: Iterator[Any] | None = None

    def begin(self) -> None:
        """Begin an epoch at the dataset's position. Persistent workers live on."""
        self._batches = iter(self._loader)

    def take(self, count: int) -> list[Mapping[str, Any]]:
        """Return the next `count` batches, or fewer at an epoch's end; DataError if a sample, batch or worker fails."""
        assert self._batches is not None
        try:
            return [to_tensors(batch) for batch in itertools.islice(self._batches, count)]
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
        shut_down_workers(batches)


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
        collate_fn=Collator(make_batch),
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
