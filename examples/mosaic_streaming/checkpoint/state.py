"""The saved state: a position in the data, and what the data was, in one string of JSON."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from streaming import Stream, StreamingDataset
from streaming.base.format import Reader
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from examples.mosaic_streaming.checkpoint.history import Segment
from examples.mosaic_streaming.checkpoint.progress import Seen
from examples.mosaic_streaming.config.loader import Config, streams_of
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling.order import Order
from examples.mosaic_streaming.tokenizer import what_decides_ids

STATE_KEY = "mosaic"
STATE_VERSION = 2
MAX_POSITION = 1 << 40
"""More epochs, or samples in one, than there ever are."""
MAX_SEEN = 1 << 60
"""More tokens than a run ever reads."""

Data = dict[str, Any]
"""What decides which samples come next, by the setting's name."""

ORDER_KEYS = ("num_canonical_nodes", "shuffle", "shuffle_seed", "sampling_method", "sampling_granularity", "epoch_size")
OTHER_KEYS = {
    *("streams", "stream_name", "stream_config", "batching_method", "shuffle_algo", "shuffle_block_size"),
    *("local", "remote", "split", "download_retry", "download_timeout", "validate_hash", "keep_zip"),
    *("predownload", "cache_limit", "allow_unsafe_types", "replication", "partition_algo", "max_seq_len"),
    *("eos_token_id", "override_eos_token_id_mismatch_error"),
    *("bos_token_id", "override_bos_token_id_mismatch_error"),
}
"""Settings of `dataset` that are described in another way, or that change neither samples nor their order."""


class State(NamedTuple):
    """What is saved.

    Attributes:
        epoch: that the next sample is of.
        sample_in_epoch: samples of it that have been read.
        global_batch_size: samples of an optimizer step.
        data: what decides which samples come next.
        seen: since the run's first step, or since the streams began anew; none in a state of before it was saved.
        steps: done since then; in a run that has gone on from a state of before this was saved, since that one.
        segments: of these steps; each start that changes the global batch begins one.
    """

    epoch: int
    sample_in_epoch: int
    global_batch_size: int
    data: Data
    seen: Seen | None
    steps: int
    segments: tuple[Segment, ...]


START_ANEW = (
    "start the new data from its beginning with --checkpoint.exclude_from_loading=dataloader, for this one start: "
    "each one that has the flag begins anew"
)


def describe(
    config: Config, dataset: StreamingDataset, order: Order, seq_len: int, tokenizer: HuggingFaceTokenizer
) -> Data:
    """What decides which samples come next, and what is in them.

    Args:
        config: the resolved loader configuration.
        dataset: built from it.
        order: the dataset's.
        seq_len: `training.seq_len`, in tokens.
        tokenizer: the model's.

    Returns:
        values by setting; paths, workers and caches are not among them.
    """
    data: Data = {"name": config["name"], "training.seq_len": seq_len}
    data["model.hf_assets_path"] = f"tokenizer {digest(what_decides_ids(tokenizer))}"
    data["dataset.max_seq_len"] = config["dataset"]["max_seq_len"]
    for number, (name, stream) in enumerate(zip(streams_of(config["dataset"]), dataset.streams, strict=True)):
        data[f"stream {number + 1}"] = {"name": name} | describe_stream(stream, shards_of(dataset, number))
    data["dataset.batching_method"] = order.batching_method
    if order.batching_method in ("per_stream", "stratified"):
        data["training.global_batch_size"] = order.global_batch_size
    if order.together > 1 or order.packed:
        samples = "samples packed into a batch" if order.packed else "training.local_batch_size"
        data[samples] = order.local_batch_size
    data |= {f"dataset.{key}": getattr(dataset, key) for key in ORDER_KEYS}
    if dataset.shuffle:
        data["dataset.shuffle_algo"] = dataset.shuffle_algo
        # The default is streaming 0.13.0's, base/dataset.py, which fills it in when it is first iterated.
        default = max(4_000_000 // config["dataset"]["num_canonical_nodes"], 1 << 18)
        data["dataset.shuffle_block_size"] = dataset.shuffle_block_size or default
    rest = sorted(set(config["dataset"]) - OTHER_KEYS - set(ORDER_KEYS))
    data |= {f"dataset.{key}": config["dataset"][key] for key in rest}
    described: Data = json.loads(json.dumps(data))  # as it will be read back
    return described


def shards_of(dataset: StreamingDataset, stream: int) -> list[Reader]:
    """The shards of a stream, by its number."""
    begin = int(dataset.shard_offset_per_stream[stream])
    return dataset.shards[begin : begin + int(dataset.shards_per_stream[stream])]


def describe_stream(stream: Stream, shards: list[Reader]) -> dict[str, str]:
    """Size, weight and index of a stream; of the index only what says which samples there are."""
    index = [
        [
            shard.samples,
            getattr(shard, "column_names", None),
            getattr(shard, "column_encodings", None),
            [(raw.bytes, raw.hashes) for raw, _ in shard.file_pairs],
        ]
        for shard in shards
    ]
    return {
        "index": f"{sum(shard.samples for shard in shards)} samples in {len(shards)} shards, {digest(index)}",
        "an epoch": f"{int(stream.choose)} samples, share {float(stream.proportion)}",
    }


def digest(value: object) -> str:
    """A short hash of a value of JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def pack(state: State) -> dict[str, str]:
    """The state: one key, so that DCP, which asks for just the keys of the fresh state, finds it in any version."""
    seen = state.seen and state.seen._asdict()
    return {STATE_KEY: json.dumps({"version": STATE_VERSION, **state._asdict(), "seen": seen})}


def unpack(saved_state: Mapping[str, object]) -> State:
    """A saved state.

    Raises:
        DataError: it is damaged, or of a version that this code doesn't know.
    """
    text = str(saved_state.get(STATE_KEY))
    try:
        saved = json.loads(text)
        version = saved["version"]
        if version == STATE_VERSION:
            epoch, sample_in_epoch = (number(saved[key], MAX_POSITION) for key in ("epoch", "sample_in_epoch"))
            global_batch_size = number(saved["global_batch_size"], MAX_POSITION, least=1)
            data = saved["data"]
            if not isinstance(data, dict):
                raise TypeError(data)
            here = Segment(0, epoch, sample_in_epoch, global_batch_size)
            seen, steps, segments = read_seen(saved.get("seen")), *read_segments(saved, here)
            return State(epoch, sample_in_epoch, global_batch_size, data, seen, steps, segments)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(text) from error
    raise DataError(
        f"The checkpoint's dataloader state is of version {version}, this code reads version {STATE_VERSION}. "
        f"Go on with the code that wrote it, or {START_ANEW}."
    )


def read_seen(saved: Any) -> Seen | None:
    """What has been read, as it is saved."""
    if saved is None:
        return None
    samples, tokens = (number(saved[key], MAX_SEEN) for key in ("samples", "tokens"))
    targets = saved["targets"]
    return Seen(samples, tokens, None if targets is None else number(targets, MAX_SEEN))


def read_segments(saved: Any, here: Segment) -> tuple[int, tuple[Segment, ...]]:
    """The steps done and their segments, as they are saved; where they aren't, what is known begins here."""
    if "segments" not in saved:
        return 0, (here,)
    segments = tuple(Segment(*(number(value, MAX_POSITION) for value in segment)) for segment in saved["segments"])
    steps, begins = number(saved["steps"], MAX_POSITION), [segment.step for segment in segments]
    sizes = [segment.global_batch_size for segment in segments]
    if begins[:1] != [0] or sorted({*begins}) != begins or begins[-1] > steps or not all(sizes):
        raise ValueError(segments)
    return steps, segments


def number(value: Any, limit: int, least: int = 0) -> int:
    """A whole number below a limit, or ValueError."""
    if type(value) is not int or not least <= value < limit:
        raise ValueError(value)
    return value


def damaged(state: str) -> DataError:
    """What to say of a state that can't be right."""
    return DataError(
        f"The checkpoint's dataloader state is damaged: {state[:200]!r}. Load an earlier checkpoint with "
        f"--checkpoint.load_step, or {START_ANEW}."
    )


def check_position(state: State, epoch_size: int) -> None:
    """Raise DataError for a position beyond the end of an epoch of so many samples."""
    if state.sample_in_epoch > epoch_size:
        raise damaged(f"{state.sample_in_epoch:,} samples read of an epoch of {epoch_size:,}")


def explain_missing(error: str) -> str | None:
    """What to do about a checkpoint that lacks what training goes on from; none for any other error of DCP.

    Source: "Missing key in checkpoint state_dict" (torch 2.13, distributed/checkpoint/default_planner.py).
    """
    key = re.search(
        r"Missing key in checkpoint state_dict: ((dataloader|train_state|optimizer|lr_scheduler)\b.*)\.", error
    )
    if not key:
        return None
    by_other = "another loader: keep its model and optimizer and start the streams from their beginning with "
    by_other += "--checkpoint.exclude_from_loading=dataloader, for this one start"
    return (
        f"The checkpoint has no {key[1]!r}. Either it is model-only, as TorchTitan writes a run's last one unless "
        "checkpoint.last_save_model_only = false: for this one start, load an earlier one with --checkpoint.load_step "
        "or begin a new run with its weights: --checkpoint.initial_load_path=<this checkpoint> and a "
        "--checkpoint.folder that doesn't exist yet. "
        f"Or it was written by {by_other if key[2] == 'dataloader' else 'another version of torch or torchtitan'}."
    )


def check_same_data(saved: Data, now: Data, path: str) -> None:
    """Raise ConfigError, with all differences, unless the samples that come next are those of the saved run.

    Args:
        saved: the data of the checkpoint.
        now: the data of this run.
        path: the loader's configuration file, for the message.
    """
    if rows := differences(saved, now):
        raise ConfigError(
            f"The checkpoint was written on other data. Going on from it would not give the samples that come next.\n"
            f"{table(['setting', 'checkpoint', 'now'], rows)}\n"
            f"Restore these in {path} and the job config, or {START_ANEW}."
        )


def differences(saved: Data, now: Data) -> list[list[str]]:
    """The settings that differ, each with both values; a stream's name makes no difference."""
    rows = []
    for key in [*saved, *(key for key in now if key not in saved)]:
        old, new = nameless(saved.get(key)), nameless(now.get(key))
        if key.startswith("stream ") and isinstance(old, dict) and isinstance(new, dict):
            label = f"{key} ({now[key].get('name')})"
            changed = [part for part in new if old.get(part) != new[part]]
            rows += [[f"{label}: {part}", show(old.get(part)), show(new[part])] for part in changed]
        elif old != new:
            rows.append([key, show(old), show(new)])
    return rows


def nameless(value: Any) -> Any:
    """A value without the name of a stream."""
    return {part: value[part] for part in value if part != "name"} if isinstance(value, dict) else value


def show(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, dict):
        return ", ".join(map(str, value.values()))
    return "not set" if value is None else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(f"  {line}".rstrip() for line in lines)
