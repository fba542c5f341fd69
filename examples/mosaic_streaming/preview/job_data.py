"""The data of a job that isn't running: its order in any layout, and its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch import check_first_samples, check_keys, is_padding, to_tensors
from examples.mosaic_streaming.checkpoint import History, Segment, Slice
from examples.mosaic_streaming.config import BatchShape, Job, LoaderFile, ResolvedLoader
from examples.mosaic_streaming.dataloader import OpenLoader
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling import assign_to_ranks, check_memory, stream_numbers


class NoRowError(DataError):
    """The loader makes no row of a sample. Training would stop there."""


@dataclass
class JobData:
    """The streams of a job that isn't running."""

    job: Job
    job_settings: list[dict[str, Any]]  # of the job config, with their owners
    file: LoaderFile  # the loader's configuration as it was read
    config: ResolvedLoader  # as the job would have it; `opened` has other caches
    opened: OpenLoader
    tokenizer: PreTrainedTokenizerBase
    folder: str  # of this process, for what it fetches
    shape: BatchShape
    validation: tuple[LoaderFile, ResolvedLoader] | None  # those of the validation loader, if the job has one

    def new_run(self) -> History:
        """What a run reads that begins with the present settings and keeps them."""
        order = self.opened.order
        return History(order, (Segment.at_beginning(order.global_batch_size),))

    def samples(self, read: Slice) -> NDArray[np.int64]:
        """The ids of samples in order, int64 [samples]."""
        self._check_memory()
        return self.opened.order.samples(self.opened.dataset, read.epoch, np.arange(read.begin, read.end))

    def counts(self, read: Slice) -> NDArray[np.int64]:
        """How many of the samples are of each stream, int64 [streams]."""
        self._check_memory()
        return self.opened.order.counts(self.opened.dataset, read.epoch, read.begin, read.end)

    def _check_memory(self) -> None:
        check_memory(self.opened.order, self.opened.dataset.epoch_size, self.opened.config.source)

    def global_batch(self, step: int, history: History | None = None) -> NDArray[np.int64]:
        """What each dp rank reads in a step of a run: int64 [dp ranks, batches, samples of a batch]."""
        rows, dp = self.opened.order.local_batch_size, self.job.layout.dp_world_size
        batch = (history or self.new_run()).batch(step)
        if batch.global_batch_size % (rows * dp):
            raise ConfigError(
                f"Step {step} has a global batch of {batch.global_batch_size} samples, which {dp} dp ranks with "
                f"batches of {rows} can't share. Give the --world-size and the training.local_batch_size that the "
                "run had then."
            )
        assigned = assign_to_ranks(self.samples(batch), self.job.layout.world(), rows, self.opened.order.group_size)
        return assigned.reshape(dp, -1, rows)

    def check_first_samples(self) -> list[str]:
        """What a start would warn of in the first samples; raises what it would refuse them with."""
        opened = self.opened
        return check_first_samples(opened.loader, opened.spec, opened.config, self.tokenizer, self.shape)

    def locate(self, sample: int) -> dict[str, Any]:
        """A sample's id, and where it is stored, for a report; raises ConfigError if there is none of this id."""
        dataset = self.opened.dataset
        if not 0 <= sample < dataset.num_samples:
            raise ConfigError(f"Sample {sample}: the streams have samples 0 to {dataset.num_samples - 1:,}.")
        stream = int(stream_numbers(dataset, np.array(sample)))
        shard, sample_of_shard = map(int, dataset.spanner[sample])
        files = [raw.basename for raw, _ in dataset.shards[shard].file_pairs]
        return {
            "sample": sample,
            "stream": self.opened.names[stream],
            "sample_of_stream": sample - int(dataset.sample_offset_per_stream[stream]),
            "shard": next(name for name in files if not name.endswith(".meta")),  # which JSON and CSV have, too
            "sample_of_shard": sample_of_shard,
        }

    def collate(self, samples: Sequence[int]) -> Mapping[str, Any]:
        """The batch that llm-foundry's collator makes of samples; raises what `read` does."""
        collate: Any = self.opened.loader.collate_fn
        read = [self.read(sample) for sample in samples]
        try:
            batch: Mapping[str, Any] = collate(read)
        except Exception as error:
            for sample in samples if len(samples) > 1 else []:
                self.collate([sample])  # which raises for the one that is at fault
            raise NoRowError(f"Sample {samples[0]} makes no row, and training would stop there: {error}") from error
        batch = to_tensors(batch)
        check_keys(batch, self.opened.spec)
        return batch

    def read(self, sample: int) -> Any:
        """A sample as llm-foundry reads it: DataError if its file is at fault, NoRowError if llm-foundry refuses it."""
        dataset = self.opened.dataset
        try:
            return dataset[sample]
        except DataError as error:
            try:
                dataset.get_item(sample)
            except Exception:
                raise error from None
            raise NoRowError(f"Sample {sample} makes no row, and training would stop there: {error}") from error

    def tokens(self, sample: int) -> list[int]:
        """The ids of a sample that its row has room for, without padding; raises what `collate` does."""
        batch = self.collate([sample])
        ids = batch["input_ids"][0]
        padding = is_padding(batch["input_ids"], batch.get("attention_mask"), self.opened.spec)
        return list(map(int, ids if padding is None else ids[~padding[0]]))

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, unchanged."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
