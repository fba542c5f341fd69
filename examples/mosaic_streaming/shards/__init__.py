"""Shards: their indexes, caches, fetching and reading.

`prepare` readies a loader's streams on each node before streaming opens them: it validates each `index`, takes each
`cache`, and verifies the files there. `make_checked_dataset` then turns llm-foundry's dataset into a `CheckedDataset`,
whose errors reach the reader, with a `CheckedStream` (fetches only right files) for each stream and a `CheckedReader`
(returns only whole samples) for each shard. `columns` and `turns` find data that a loader can't read or would misread.
"""

from examples.mosaic_streaming.shards.columns import FORMS, check_columns, columns_of, form_of
from examples.mosaic_streaming.shards.dataset import CheckedDataset, Failure, make_checked_dataset
from examples.mosaic_streaming.shards.fetch_stats import FetchCounts, FetchStats, fetch_stats_file
from examples.mosaic_streaming.shards.index import ADD_HASHES
from examples.mosaic_streaming.shards.prepare import fetch_index, make_stream, prepare_streams
from examples.mosaic_streaming.shards.stream import CheckedStream
