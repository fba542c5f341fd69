"""The training loader: `build_mosaic_dataloader` builds it, and `MosaicDataLoader` is what TorchTitan iterates."""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch.distributed as dist
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming import batch, checkpoint, config, distributed, sampling, shards
from examples.mosaic_streaming.batch import BatchSpec, TitanBatch
from examples.mosaic_streaming.checkpoint import State
from examples.mosaic_streaming.config import Job, Plan, ResolvedLoader
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_pad_token, check_tokenizer
from examples.mosaic_streaming.upstream.large_index import large_indexes, without_collection
from examples.mosaic_streaming.upstream.sample_order import reader_world, set_reader_world
from examples.mosaic_streaming.upstream.shared_memory import keep_locks_together, shared_memory

PREFETCH_STEPS = 100  # before a stage begins, its first shards are fetched


@without_collection()
def build_mosaic_dataloader(
    job: Job,
    dp_rank: int,
    titan_tokenizer: HuggingFaceTokenizer,
    plan: Plan,
    loader_configs: Sequence[ResolvedLoader],
    channel: AbortChannel,
) -> "MosaicDataLoader":
    """Build the training loader of one rank, `dp_rank` on TorchTitan's batch mesh. All ranks call it together.

    ConfigError if the loaders, the tokenizer, the model and the job don't fit together. DataError if an index or a
    first sample can't be read.
    """
    hf_tokenizer = build_transformers_tokenizer(job.assets, titan_tokenizer)
    check_tokenizer(titan_tokenizer, job)
    loader_configs = [config.without_token_ids(one, hf_tokenizer) for one in loader_configs]
    number = distributed.draw_number()
    channel.connect(number)
    distributed.check_ranks_per_node()
    distributed.on_each_node(number, lambda: shards.prepare_streams(loader_configs))
    who = f"Rank {dist.get_rank()} (dp rank {dp_rank})"

    def open_stage(loader_config: ResolvedLoader) -> "OpenLoader":
        loader_config = fill_in_packing_ratio(loader_config, job, hf_tokenizer, distributed.on_rank_0)
        if is_rank_0():
            logger.info(f"Mosaic loader of {loader_config.source}, resolved: {json.dumps(loader_config.config)}")
        opened = open_loader(job, loader_config, titan_tokenizer, hf_tokenizer, distributed.draw_number(), who)
        sampling.check_memory(opened.order, opened.dataset.epoch_size, loader_config.source)
        warnings: list[str] = distributed.on_rank_0(
            lambda: batch.check_first_samples(opened.loader, opened.spec, loader_config, hf_tokenizer, job.training)
        )
        set_reader_world(opened.dataset, job.layout.world(dp_rank))  # the first samples were read as by a single reader
        if is_rank_0():
            sampling.log_mixture(opened.names, opened.dataset, opened.order, opened.tokens_of_a_sample)
            for warning in warnings + config.warnings_of(loader_config, job, hf_tokenizer, opened.columns):
                logger.warning(warning)
        return opened

    return MosaicDataLoader([open_stage(one) for one in loader_configs], plan, dp_rank, job, channel)


def build_foundry_loader(
    loader_config: ResolvedLoader, hf_tokenizer: PreTrainedTokenizerBase, batch_size: int, shm_number: int
) -> DataLoader[Any]:
    """Build llm-foundry's loader over streams that are ready on this machine. All ranks call it together.

    `batch_size` is in rows per dp rank. `shm_number` names the dataset's shared memory, and is the same on all ranks.
    ConfigError if llm-foundry or streaming refuses the configuration, or the streams don't have the right columns.
    """
    name, source = loader_config.name, loader_config.source
    arguments = copy.deepcopy(loader_config.arguments)  # because build_dataloader changes them
    try:
        with shared_memory(shm_number), large_indexes():
            data_spec: Any = build_dataloader(arguments, hf_tokenizer, batch_size)
    except Exception as error:
        raise ConfigError(f"{loader_config.builder} refuses {source}: {type(error).__name__}: {error}") from error
    loader = getattr(data_spec, "dataloader", data_spec)  # a user's builder may return the bare loader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{source} does not stream: give `dataset` a `remote` or `streams`.")
    if loader.batch_size is None or len(loader.dataset.streams) != len(loader_config.streams):
        raise ConfigError(
            f"The loader {name!r} of {source} has {len(loader.dataset.streams)} streams and batch_size = "
            f"{loader.batch_size}, expected the {len(loader_config.streams)} of the file, and a number."
        )
    # In place, and in this order: each step needs the one before it.
    shards.check_columns(loader.dataset, name, loader_config.labels, source)
    shards.make_checked_dataset(loader.dataset, loader_config.labels, loader_config.may_cut)
    check_pad_token(name, loader.dataset.shards[0], hf_tokenizer)
    batch.use_fast_collator(loader, name == "text")
    keep_locks_together(loader.dataset)
    return loader


@dataclass(frozen=True)
class OpenLoader:
    """llm-foundry's loader over open streams, with the order in which they are read."""

    config: ResolvedLoader
    loader: DataLoader[Any]
    order: sampling.Order
    spec: BatchSpec  # what the batches have to look like
    fingerprint: checkpoint.Fingerprint

    @property
    def dataset(self) -> shards.CheckedDataset:
        return cast(shards.CheckedDataset, self.loader.dataset)

    @property
    def collator(self) -> batch.Collator:
        return cast(batch.Collator, self.loader.collate_fn)

    @property
    def names(self) -> list[str]:
        return list(self.config.streams)

    @property
    def columns(self) -> list[str]:
        """The columns of the first stream."""
        return list(getattr(self.dataset.shards[0], "column_names", []))

    def with_nodes_of(self, saved: checkpoint.Fingerprint) -> "OpenLoader":
        """Return it with the `num_canonical_nodes` of a checkpoint where that is 64, and the file gives none.

        The default for small data was 64, too, when the checkpoint was written.
        """
        nodes, settings = saved.get("dataset.num_canonical_nodes"), self.config.dataset
        if "num_canonical_nodes" in settings or nodes != sampling.MAX_CANONICAL_NODES:
            return self
        dataset, old = self.dataset, self.order
        dataset.num_canonical_nodes, dataset.shuffle_block_size = nodes, settings.get("shuffle_block_size")
        sizes = (old.local_batch_size, old.global_batch_size)
        order = sampling.set_order(dataset, old.batching_method, *sizes, old.packed)
        sampling.check_order(order, dataset, self.names, self.config.source)
        own = {f"dataset.{key}": getattr(dataset, key) for key in ("num_canonical_nodes", "shuffle_block_size")}
        fingerprint = {key: own.get(key, value) for key, value in self.fingerprint.items()}
        return replace(self, order=order, fingerprint=fingerprint)

    @property
    def tokens_of_a_sample(self) -> int | None:
        """How many tokens of each sample the model gets. Text fills its rows; other samples differ in length: None."""
        return self.spec.seq_len if self.spec.labels_are_ids else None


def open_loader(
    job: Job,
    loader_config: ResolvedLoader,
    titan_tokenizer: HuggingFaceTokenizer,
    hf_tokenizer: PreTrainedTokenizerBase,
    shm_number: int,
    who: str,
) -> OpenLoader:
    """Open the training streams with `build_foundry_loader`. `who` reads them, for messages.

    ConfigError also if an epoch fills no global batch.
    """
    loader = build_foundry_loader(loader_config, hf_tokenizer, job.training.local_batch_size, shm_number)
    dataset, batch_size = cast(StreamingDataset, loader.dataset), cast(int, loader.batch_size)
    # In samples. `batch_size` differs from the rows of a batch where several samples are packed into a row.
    global_batch_size = batch_size * job.global_batch_size // job.training.local_batch_size
    packs, method = cast(Any, loader.collate_fn).packs, loader_config.batching_method(dataset)
    order = sampling.set_order(dataset, method, batch_size, global_batch_size, packs)
    sampling.check_order(order, dataset, list(loader_config.streams), loader_config.source)
    spec = batch.spec_of(job, job.training, loader_config, hf_tokenizer, who)
    fingerprint = checkpoint.fingerprint_of(loader_config, dataset, order, job.training.seq_len, titan_tokenizer)
    return OpenLoader(loader_config, loader, order, spec, fingerprint)


def fill_in_packing_ratio(
    loader_config: ResolvedLoader, job: Job, hf_tokenizer: PreTrainedTokenizerBase, on_one: Callable[..., Any]
) -> ResolvedLoader:
    """Replace `packing_ratio = "auto"` by a number. All ranks call it together.

    `on_one` calls a function on one rank, and returns its result on all.
    """
    if loader_config.dataset.get("packing_ratio") != "auto":
        return loader_config
    rows, any_ratio = job.training.local_batch_size, loader_config.with_settings(packing_ratio=1)
    loader = build_foundry_loader(any_ratio, hf_tokenizer, rows, distributed.draw_number())
    return loader_config.with_settings(packing_ratio=on_one(lambda: batch.choose_ratio(loader, rows, loader_config)))


class MosaicDataLoader(BaseDataLoader):
    """Yields this rank's batches without end, stage after stage and epoch after epoch, from any saved position.

    An epoch is as many whole global batches as the streams' epoch holds. The rest of it is left out, so that no
    optimizer step mixes two epochs. Under "blend" the first epoch never ends. The position counts whole optimizer
    steps, as batches are yielded: what workers have prefetched doesn't count. The datasets of all stages know the place
    of this rank, which is `dp_rank` on TorchTitan's batch mesh (`set_reader_world`).
    """

    def __init__(self, stages: Sequence[OpenLoader], plan: Plan, dp_rank: int, job: Job, channel: AbortChannel) -> None:
        self.has_started = False  # whether a batch has been asked for
        self.is_new_run = True  # whether the run begins with this start
        self._stages, self._plan, self._dp_rank, self._job, self._channel = tuple(stages), plan, dp_rank, job, channel
        self._prefetching: BaseProcess | None = None
        self._counter = checkpoint.ConsumptionCounter()
        self._fetch_stats = shards.FetchStats(shards.fetch_stats_file(one.dataset._shm_prefix_int) for one in stages)
        self._packing = batch.PackingLog()
        self._steps = self._epoch = self._sample_in_epoch = 0
        """Optimizer steps since the streams began, the epoch that is read, and where in it the last step has ended."""
        self._steps_with_skips = {plan.steps(skip.last) for skip in plan.skips}  # behind which batches are skipped
        self._history = checkpoint.History.of(plan, [one.order for one in stages], self._fingerprints)
        self._use_stage(0)

    def _use_stage(self, number: int) -> None:
        self._stage, self._opened, self._order = number, self._stages[number], self._history.orders[number]
        self._dataset, self._spec, self.config = self._opened.dataset, self._opened.spec, self._opened.config
        self._counter.count_for(self._spec, self._order.local_batch_size)
        self._batches = batch.Batches(self._opened.loader, self._spec.source, self.config.source)
        self._is_checked = False

    @property
    def _fingerprints(self) -> list[checkpoint.Fingerprint]:
        return [one.fingerprint | at.recorded for one, at in zip(self._stages, self._plan.stages, strict=True)]

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield batches from the present position on, forever. `to_titan_batch` describes them.

        DataError if a batch is not as it has to be, ranks don't read the same data, an epoch ends early, or a global
        batch has no loss token. RuntimeError if this is not the first iteration.
        """
        if self.has_started:
            raise RuntimeError("A MosaicDataLoader can be iterated once.")
        self.has_started = True
        self._begin(*self._history.order(self._steps))
        self._log_start()
        while True:
            self._batches.begin()
            for sample in self._order.steps(self._epoch):
                micro_batches, loss_tokens = self._next_step(sample), 0
                for number, micro_batch in enumerate(micro_batches, start=1):
                    titan_batch, padding = batch.convert(micro_batch, self._spec)
                    if not self._is_checked:
                        self._check_peers(titan_batch, sample)
                    loss_tokens += self._counter.add(titan_batch[1], padding)
                    if number == len(micro_batches):  # TorchTitan saves after a step, before it asks for another batch
                        if not loss_tokens:
                            self._stop_if_no_rank_has_loss_tokens(sample)
                        self._counter.add_step(self._order.global_batch_size)
                        self._steps, self._sample_in_epoch = self._steps + 1, sample + self._order.global_batch_size
                    yield from batch.split_rows(titan_batch, self._job.microbatches)
            self._log_epoch_end()
            self._go_on()

    def _begin(self, stage: int, order: sampling.Order) -> None:
        """Begin to read in an order, which is that of a stage from the present position on."""
        if stage != self._stage:
            self._use_stage(stage)
        self._order, self._epoch = sampling.start_at(self._dataset, order), order.first_epoch
        self._sample_in_epoch = order.first_sample
        self._prefetch_step = self._steps + max(1, self._history.steps_left(self._steps) - PREFETCH_STEPS)

    def _go_on(self) -> None:
        stage, order = self._history.order(self._steps)
        if stage == self._stage:
            if order.first_epoch != self._epoch + 1:  # which all is skipped
                self._dataset.next_epoch = order.first_epoch
            self._epoch, self._sample_in_epoch = order.first_epoch, order.first_sample
            return
        self._batches.close()
        if self._prefetching:
            self._prefetching.kill()  # the readers fetch what it hasn't
            self._prefetching.join()
        following = self._stages[stage].dataset
        if following.cache_limit:
            distributed.on_each_node(distributed.draw_number(), following.take_stock)
        self._begin(stage, order)
        if is_rank_0():
            logger.info(checkpoint.stage_message(self._opened.names, self._dataset, self._history, self._steps))

    def _check_peers(self, titan_batch: TitanBatch, sample: int) -> None:
        """Compare the first batch of a stage with those of this rank's peers, and all settings with everyone's."""
        world, settings, hashes = reader_world(self._dataset), dict(self._opened.fingerprint), self._fingerprints
        settings |= {f"stage {number}": data for number, data in enumerate(hashes, start=1) if len(hashes) > 1} | {
            "samples of a global batch": self._order.global_batch_size,
            "samples of a rank's batch": self._order.local_batch_size,
            "nodes x dp ranks on each": f"{world.num_nodes} x {world.ranks_per_node}",
            "epoch": self._epoch,
            "samples read of the epoch": sample,
            "stages and skips that follow": ", ".join(checkpoint.plan_ahead(self._plan, self._steps, hashes)),
        }
        distributed.check_peers(titan_batch, self._dp_rank, settings, self.config.source)
        self._is_checked = True

    @property
    def _accumulation(self) -> int:
        """Micro-batches of this rank in an optimizer step."""
        return self._order.global_batch_size // (self._order.local_batch_size * reader_world(self._dataset).num_ranks)

    def _next_step(self, sample: int) -> list[Mapping[str, Any]]:
        """This rank's micro-batches of the next optimizer step, which begins at a sample of the epoch."""
        self._channel.exit_if_signalled()
        if self._steps == self._prefetch_step and dist.get_rank() % self._job.layout.ranks_per_node == 0:
            stage, order = self._history.order(self._steps + self._history.steps_left(self._steps))
            following = self._stages[stage]
            self._prefetching = shards.fetch_first(following.dataset, order, following.loader.num_workers)
        micro_batches = self._batches.take(self._accumulation)
        if len(micro_batches) < self._accumulation:
            place = f"{sample} of {self._order.epoch_samples} samples"
            raise DataError(f"Epoch {self._epoch} ended after {place}. {self._spec.source}")
        self._packing.add(micro_batches)
        if self._steps in self._steps_with_skips and is_rank_0():
            logger.info(checkpoint.skip_message(self._history, self._steps))
        return micro_batches

    def _stop_if_no_rank_has_loss_tokens(self, sample: int) -> None:
        """Raise DataError if no rank has a loss token in this step. Each rank without one calls it; the last raises.

        TorchTitan would divide by the number of loss tokens, log a loss of NaN and go on. It sums them over ranks once
        each rank has all batches of the step. So a rank that raises before it yields its last batch keeps all ranks
        from changing the model (torchtitan 0.2.2, train.py).
        """
        if self._channel.count(f"no loss token in step {self._steps + 1}") == dist.get_world_size():
            raise batch.no_loss_token_error(self._dataset, self._order, self._stage + 1, self._epoch, sample)

    def state_dict(self) -> dict[str, str]:
        """The position of the next batch: the same JSON string on each rank, under one key."""
        return checkpoint.pack(State.of(self._history, self._steps, self._fingerprints, self._counter.seen()))

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Continue from a saved position. Call it before iterating.

        DataError if the state is damaged, or of another version. ConfigError if the data, or the plan up to the
        position, is not what it was when the state was saved. RuntimeError if the loader is iterated already.
        """
        if self.has_started:
            raise RuntimeError("A MosaicDataLoader that is iterated can't load another position: build a new one.")
        saved = checkpoint.unpack(state_dict)
        begun = [one.with_nodes_of(data) for one, data in zip(self._stages, saved.stages, strict=False)]
        self._stages = (*begun, *self._stages[len(begun) :])
        checkpoint.check_same_data(saved, self._plan, self._fingerprints)
        checkpoint.check_position(saved, begun[-1].dataset.epoch_size, begun[-1].order)
        self._history = saved.history(self._plan, [one.order for one in self._stages], self._fingerprints)
        self._steps, self.is_new_run = saved.steps, False
        self._use_stage(len(saved.past))
        if (seen := saved.seen) is None:  # in a state of an earlier version, whose run had one global batch size
            in_an_epoch = sampling.round_down(self._order.epoch_samples, saved.global_batch_size)
            samples = saved.epoch * in_an_epoch + saved.sample_in_epoch
            seen = checkpoint.ConsumedCounts(samples, self._counter.tokens(samples))
        self._counter.resume_from(seen)
        for message in checkpoint.resume_messages(saved, self._history, self._fingerprints) if is_rank_0() else []:
            logger.warning(message)

    def progress(self) -> checkpoint.Progress:
        """Where the run is. It takes one small collective, so all ranks have to call it at the same step."""
        self._counter.count_loss_tokens(peers=dist.get_world_size() // reader_world(self._dataset).num_ranks)
        order, read = self._order, self._sample_in_epoch
        passes = sampling.passes_of(self._opened.names, self._dataset, order, read) if order.blend else None
        place = (self._epoch, read / (read + order.remaining(read)), passes)
        counts = (self._counter.seen(), self._counter.take_padding(), self._fetch_stats.read())
        of_plan = (self._stage + 1, self._plan.batch(self._steps) - self._steps)
        return checkpoint.Progress(*place, *counts, self._dataset.bytes_in_cache(), *of_plan)

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._batches.lost_workers()

    def close(self) -> None:
        """Log what is left to say of the epoch and of packing, and end the dataloader workers."""
        if not self._order.remaining(self._sample_in_epoch):  # the run ends with an epoch: `__iter__` has not logged
            self._log_epoch_end()
        self._packing.log()
        self._batches.close()

    def _log_start(self) -> None:
        """Log on rank 0 where in the streams the run starts, what an epoch leaves out, and what a new run will read."""
        if not is_rank_0():
            return
        data = (self._opened.names, self._dataset, self._history)
        message, left_out = checkpoint.start_message(*data, self._steps)
        if self.is_new_run and self._job.steps and not self._job.checkpoints.counts_anew:
            message += checkpoint.run_message(*data, self._steps, self._job.steps, self._counter)
        if before := self._counter.seen().samples:
            message += f" {before:,} samples were read before this start."
        logger.log(logging.INFO if left_out < batch.DROP_WARN_FRACTION else logging.WARNING, message)

    def _log_epoch_end(self) -> None:
        """Log on rank 0 what this start has read of the epoch, and what its machine and packing have done meanwhile."""
        fetched = self._fetch_stats.since_last()
        if is_rank_0():
            logger.info(checkpoint.epoch_end_message(self._stage, self._order, self._epoch, fetched, self._counter))
        self._packing.log()
