"""Shards: their indexes, caches, fetching and reading.

`prepare_streams` readies a loader's streams on each node before streaming opens them: it validates their indexes
(`index.py`), takes their caches (`cache.py`), and verifies the files there. `make_checked_dataset` then turns
llm-foundry's dataset into a `CheckedDataset`, whose errors reach the reader. It has a `CheckedStream` for each stream,
which fetches only right files (`check_file` in `stream.py`), and a `CheckedReader` for each shard, which returns only
whole samples. `check_columns` finds data that a loader can't read (`forms.py`). `FetchStats` counts what is fetched.
`add_hashes.py` is a program that adds hashes to an index.
"""

from examples.mosaic_streaming.shards.dataset import CheckedDataset, as_data_error, make_checked_dataset
from examples.mosaic_streaming.shards.fetch_stats import FetchCounts, FetchStats, fetch_stats_file
from examples.mosaic_streaming.shards.forms import FORMS, check_columns, columns_of, form_of
from examples.mosaic_streaming.shards.index import ADD_HASHES
from examples.mosaic_streaming.shards.prepare import fetch_first, fetch_index, make_stream, prepare_streams
from examples.mosaic_streaming.shards.stream import CheckedStream
