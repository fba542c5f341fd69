"""The fingerprint of the data: all that decides which samples come next and what is in them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streaming import StreamingDataset
from streaming.base.format import Reader
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from examples.mosaic_streaming.config import ResolvedLoader, explain_asset_errors, tokenizer_config
from examples.mosaic_streaming.sampling import SHARE_DIGITS, Order

Fingerprint = dict[str, Any]
"""What a checkpoint records of the data, by the setting's name; values are those of JSON."""

ORDER_KEYS = ("num_canonical_nodes", "shuffle", "shuffle_seed")
EPOCH_KEYS = ("sampling_method", "sampling_granularity", "epoch_size")
METHOD = "dataset.batching_method"
OTHER_KEYS = {
    *("streams", "stream_name", "stream_config", "batching_method", "shuffle_algo", "shuffle_block_size"),
    *("local", "remote", "split", "download_retry", "download_timeout", "validate_hash", "keep_zip"),
    *("predownload", "cache_limit", "allow_unsafe_types", "replication", "partition_algo", "max_seq_len"),
    *("eos_token_id", "override_eos_token_id_mismatch_error"),
    *("bos_token_id", "override_bos_token_id_mismatch_error"),
}
"""Settings of `dataset` that are recorded otherwise, or that change neither samples nor their order."""

ASSETS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
CONFIG_KEYS = ("bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template")
"""The keys of tokenizer_config.json that decide token ids."""

START_ANEW = (
    "start the new data from its beginning with --checkpoint.exclude_from_loading=dataloader, for this one start: "
    "each one that has the flag begins anew"
)


def fingerprint_of(
    loader: ResolvedLoader, dataset: StreamingDataset, order: Order, seq_len: int, tokenizer: HuggingFaceTokenizer
) -> Fingerprint:
    """Return the fingerprint of a loader's data, without paths, workers and caches; `seq_len` is `training.seq_len`."""
    data: Fingerprint = {"name": loader.name, "training.seq_len": seq_len}
    data["model.hf_assets_path"] = f"tokenizer {digest(tokenizer_fingerprint(tokenizer))}"
    data["dataset.max_seq_len"] = loader.dataset["max_seq_len"]
    for index, (name, stream) in enumerate(zip(loader.streams, dataset.streams, strict=True)):
        weight = {"an epoch": f"{int(stream.choose)} samples, share {float(stream.proportion)}"}
        if order.blend:  # where shares alone count, whatever they are computed from
            weight = {"share": str(order.blend.streams[index].weight / 10**SHARE_DIGITS)}
        data[f"stream {index + 1}"] = {"name": name, "index": index_fingerprint(shards_of(dataset, index))} | weight
    data[METHOD] = order.batching_method
    if order.batching_method in ("per_stream", "stratified"):
        data["training.global_batch_size"] = order.global_batch_size
    if order.group_size > 1 or order.packed:
        data["samples packed into a batch" if order.packed else "training.local_batch_size"] = order.local_batch_size
    keys: tuple[str, ...] = ORDER_KEYS if order.blend else ORDER_KEYS + EPOCH_KEYS
    if dataset.shuffle:
        keys += ("shuffle_block_size",) if order.blend else ("shuffle_algo", "shuffle_block_size")
    data |= {f"dataset.{key}": getattr(dataset, key) for key in keys}
    rest = sorted({*loader.dataset} - OTHER_KEYS - {*ORDER_KEYS, *EPOCH_KEYS})
    data |= {f"dataset.{key}": loader.dataset[key] for key in rest}
    return dict(json.loads(json.dumps(data)))  # as it will be read back


def shards_of(dataset: StreamingDataset, stream: int) -> list[Reader]:
    """Return the shards of a stream, given its index in the dataset."""
    begin = int(dataset.shard_offset_per_stream[stream])
    return dataset.shards[begin : begin + int(dataset.shards_per_stream[stream])]


def index_fingerprint(shards: list[Reader]) -> str:
    """Size and index.json of a stream; of the last only what says which samples there are."""
    index = []
    for shard in shards:
        columns = [getattr(shard, key, None) for key in ("column_names", "column_encodings")]
        index.append([shard.samples, *columns, [(raw.bytes, raw.hashes) for raw, _ in shard.file_pairs]])
    return f"{sum(shard.samples for shard in shards)} samples in {len(shards)} shards, {digest(index)}"


def tokenizer_fingerprint(tokenizer: HuggingFaceTokenizer) -> list[object]:
    """The content of the assets that token ids depend on, whatever version of a library reads them."""
    config = tokenizer_config(tokenizer.tokenizer_path)
    chosen = {key: config.get(key, getattr(tokenizer, key, None)) for key in CONFIG_KEYS} if config else None
    found: list[object] = [chosen]
    with explain_asset_errors(tokenizer.tokenizer_path, "Python"):
        for name in ASSETS:
            if (file := Path(tokenizer.tokenizer_path, name)).is_file():
                text = file.read_text()
                found += [name, json.loads(text) if name.endswith(".json") else text]
    return found


def digest(value: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def streams_in(fingerprint: Fingerprint) -> list[tuple[str, str]]:
    """Return what says which samples a stream has, and its name, of each stream."""
    streams = [value for key, value in fingerprint.items() if key.startswith("stream ")]
    return [(stream["index"], stream["name"]) for stream in streams]


def stream_keys(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Number the streams of all stages, of each stage in their order; the same stream has the same number.

    A stream is known by its index. Of streams with equal indexes, one of the same name is preferred.
    """
    known: list[tuple[str, str]] = []
    found = []
    for streams in map(streams_in, fingerprints):
        keys: dict[int, int] = {}
        for length in (2, 1):  # index and name, then the index alone
            for place, stream in enumerate(streams):
                free = [key for key, old in enumerate(known) if key not in keys.values()]
                same = [key for key in free if known[key][:length] == stream[:length]]
                if place not in keys and same:
                    keys[place] = same[0]
        for place, stream in enumerate(streams):
            if place not in keys:
                keys[place] = len(known)
                known.append(stream)
        found.append([keys[place] for place in range(len(streams))])
    return found


def differences(saved: Fingerprint, now: Fingerprint) -> list[list[str]]:
    """Return the settings that differ, each with both values, as rows of a table. Names of streams may differ.

    Where "blend" takes another method's place, or the other way round, settings that one of them lacks are left out.
    """
    rows, methods = [], [saved.get(METHOD), now.get(METHOD)]
    has_same_settings = methods[0] == methods[1] or "blend" not in methods
    for key in [*saved, *(key for key in now if key not in saved)]:
        old, new = without_name(saved.get(key)), without_name(now.get(key))
        if not has_same_settings and key != METHOD and (key not in saved or key not in now):
            continue
        if key.startswith("stream ") and isinstance(old, dict) and isinstance(new, dict):
            label = f"{key} ({now[key].get('name')})"
            changed = [what for what in new if old.get(what) != new[what] and (has_same_settings or what in old)]
            rows += [[f"{label}: {what}", shown(old.get(what)), shown(new[what])] for what in changed]
        elif old != new:
            rows.append([key, shown(old), shown(new)])
    return rows


def without_name(value: Any) -> Any:
    """Return a setting's value without the name of a stream, which changes nothing."""
    return {key: value[key] for key in value if key != "name"} if isinstance(value, dict) else value


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, dict):
        return ", ".join(map(str, value.values()))
    return "not set" if value is None else str(value)
