"""What llm-foundry's loaders and streaming take, as data: a file is checked before they are imported, which is slow.

Arguments that no configuration can give are left out. `tests/upstream/test_signatures.py` compares these tables with
what is installed.

Source: llm-foundry 0.22.0, data/text_data.py, data/utils.py and data/finetuning/dataloader.py; mosaicml-streaming
0.13.0, base/dataset.py, stream.py, shuffle, partition and batching.
"""

from typing import Any, Literal

TOKEN_IDS = ["eos_token_id", "bos_token_id"]
OVERRIDES = [f"override_{key}_mismatch_error" for key in TOKEN_IDS]

BUILDER: dict[str, Any] = {
    **{"dataset": dict[str, Any], "device_batch_size": int | float, "num_workers": int, "prefetch_factor": int},
    **{"drop_last": bool, "pin_memory": bool, "persistent_workers": bool, "timeout": int},
}
"""The arguments of llm-foundry's builders of loaders, and their types."""

STREAM: dict[str, Any] = {
    **{"remote": str | None, "local": str | None, "split": str | None},
    **{"proportion": float | None, "repeat": float | None, "choose": int | None},
    **{"download_retry": int | None, "download_timeout": float | None},
    **{"validate_hash": str | None, "keep_zip": bool | None},
}
"""The settings of a stream, and their types."""

STREAM_DEFAULTS: dict[str, Any] = {
    **{"split": None, "download_retry": 2, "download_timeout": 60.0, "validate_hash": None, "keep_zip": False}
}
"""The settings that streams take over from `dataset`, and streaming's defaults."""

STREAMING: dict[str, Any] = {
    **{key: STREAM[key] for key in ("remote", "local", *STREAM_DEFAULTS)},
    **{"streams": Any, "stream_name": str, "stream_config": dict[str, Any] | None},
    **{"epoch_size": str | int | None, "predownload": int | None, "cache_limit": str | int | None},
    **{"sampling_granularity": int, "num_canonical_nodes": int | None, "batch_size": int | None},
    **{"shuffle": bool, "shuffle_seed": int, "shuffle_block_size": int | None},
    **{"allow_unsafe_types": bool, "replication": int | None},
    "sampling_method": Literal["balanced", "fixed"],
    "partition_algo": Literal["orig", "relaxed"],
    "shuffle_algo": Literal["py1br", "py1e", "py1s", "py2s", "naive"],
    "batching_method": Literal["random", "stratified", "per_stream", "device_per_stream", "blend"],
}
"""The settings of streaming's dataset, and their types. "blend" is ours."""

LOADERS = ["contrastive_pairs", "finetuning", "text"]
"""The loaders in llm-foundry's registry."""

BOTH = [*STREAMING, "max_seq_len", "token_encoding_type", *TOKEN_IDS, *OVERRIDES]
DATASET_KEYS = {
    "text": BOTH,
    "finetuning": [
        *(*BOTH, "hf_name", "hf_kwargs", "safe_load", "preprocessing_fn", "target_prompts", "target_responses"),
        *("decoder_only_format", "pad_to_longest", "allow_pad_trimming", "seq_parallel_replication"),
        *("packing_ratio", "auto_packing_replication", "max_leftover_bins_to_keep"),
    ],
}
"""The keys of `dataset` by loader; loaders that a user has registered check them themselves.

The text loader silently drops keys that it doesn't know. Its collator's `mlm_probability` is left out here: it masks
inputs, which no causal model wants.
"""
