"""Indexes, fetching, caches and reading: only files that are right, and errors that reach the reader."""

from examples.mosaic_streaming.shards.columns import FORMS, check_columns, columns_of, form_of
from examples.mosaic_streaming.shards.dataset import CheckedDataset, Failure, check_dataset
from examples.mosaic_streaming.shards.fetch_stats import FetchCounts, FetchStats, fetch_stats_file
from examples.mosaic_streaming.shards.index import ADD_HASHES
from examples.mosaic_streaming.shards.prepare import get_index, make_stream, prepare_streams
from examples.mosaic_streaming.shards.stream import CheckedStream
