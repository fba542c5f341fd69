"""The data of a job that isn't running: its order in any layout, and its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch import check_first_samples, check_keys, is_padding
from examples.mosaic_streaming.checkpoint import Fingerprint, History, Slice
from examples.mosaic_streaming.config import BatchShape, Job, Plan, ResolvedLoader
from examples.mosaic_streaming.dataloader import OpenLoader
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling import Order, assign_to_ranks, check_memory, stream_numbers
from examples.mosaic_streaming.shards import CheckedDataset


class NoRowError(DataError):
    """The loader makes no row of a sample. Training would stop there."""


@dataclass
class JobData:
    """The streams of a job that isn't running."""

    job: Job
    job_settings: list[dict[str, Any]]  # of the job config, with their owners
    config: ResolvedLoader  # as the job would have it; `opened` has other caches
    opened: OpenLoader
    tokenizer: PreTrainedTokenizerBase
    folder: str  # of this process, for what it fetches
    shape: BatchShape
    validation: ResolvedLoader | None  # of the validation loader, if the job has one
    plan: Plan
    stage: int  # of the plan, whose loader this is, counted from 0
    stages: list["JobData"]  # all of the plan

    def new_run(self) -> History:
        """What a run reads that begins with the present settings and keeps them."""
        return History.of(self.plan, self.orders, self.fingerprints)

    @property
    def orders(self) -> list[Order]:
        return [stage.opened.order for stage in self.stages]

    @property
    def fingerprints(self) -> list[Fingerprint]:
        return [one.opened.fingerprint | at.recorded for one, at in zip(self.stages, self.plan.stages, strict=True)]

    def samples(self, read: Slice, history: History) -> NDArray[np.int64]:
        """The ids of samples in order, int64 [samples]; ids are those of their stage."""
        order, dataset = self._of(read, history)
        return order.samples(dataset, read.epoch, np.arange(read.begin, read.end))

    def counts(self, read: Slice, history: History) -> NDArray[np.int64]:
        """How many of the samples are of each stream of their stage, int64 [streams]."""
        order, dataset = self._of(read, history)
        return order.counts(dataset, read.epoch, read.begin, read.end)

    def _of(self, read: Slice, history: History) -> tuple[Order, CheckedDataset]:
        opened = self.stages[read.stage].opened
        check_memory(opened.order, opened.dataset.epoch_size, opened.config.source)
        return history.orders[read.stage], opened.dataset

    def global_batch(self, step: int, history: History | None = None) -> tuple["JobData", NDArray[np.int64]]:
        """The stage that a step of a run reads, and what each dp rank does: int64 [dp ranks, batches, samples]."""
        history = history or self.new_run()
        batch = history.slice(step)
        stage, dp = self.stages[batch.stage], self.job.layout.dp_world_size
        rows = stage.opened.order.local_batch_size
        if batch.global_batch_size % (rows * dp):
            raise ConfigError(
                f"Step {step} has a global batch of {batch.global_batch_size} samples, which {dp} dp ranks with "
                f"batches of {rows} can't share. Give the --world-size and the training.local_batch_size that the "
                "run had then."
            )
        samples, group_size = self.samples(batch, history), stage.opened.order.group_size
        return stage, assign_to_ranks(samples, self.job.layout.world(), rows, group_size).reshape(dp, -1, rows)

    def check_first_samples(self) -> list[str]:
        """What a start would warn of in the first samples; raises what it would refuse them with."""
        opened = self.opened
        return check_first_samples(opened.loader, opened.spec, opened.config, self.tokenizer, self.shape)

    def locate(self, sample: int) -> dict[str, Any]:
        """A sample's id, and where it is stored, for a report; raises ConfigError if there is none of this id."""
        dataset = self.opened.dataset
        if not 0 <= sample < dataset.num_samples:
            of_stage = f" of stage {self.stage + 1} (--stage)" if len(self.stages) > 1 else ""
            raise ConfigError(f"Sample {sample}: the streams{of_stage} have samples 0 to {dataset.num_samples - 1:,}.")
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
        read = [self.read(sample) for sample in samples]
        try:
            batch = self.opened.collator(read)
        except Exception as error:
            for sample in samples if len(samples) > 1 else []:
                self.collate([sample])  # which raises for the one that is at fault
            raise NoRowError(f"Sample {samples[0]} makes no row, and training would stop there: {error}") from error
        batch = self.opened.collator.take(batch)
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
