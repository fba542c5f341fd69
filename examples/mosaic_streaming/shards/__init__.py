"""Reads streams: only right files come into a cache, and every error reaches the reader.

At a start, `prepare_streams` makes indexes and caches ready on each node, and verifies what is there. `check_dataset`
then turns llm-foundry's dataset into a `CheckedDataset` of `CheckedStream`s, which fetch shards while training reads.
`check_columns` compares the columns with the loader, and `FetchStats` counts what was fetched.
"""

from examples.mosaic_streaming.shards.columns import FORMS, check_columns, columns_of, form_of
from examples.mosaic_streaming.shards.dataset import CheckedDataset, Failure, check_dataset
from examples.mosaic_streaming.shards.fetch_stats import FetchCounts, FetchStats, fetch_stats_file
from examples.mosaic_streaming.shards.index import ADD_HASHES
from examples.mosaic_streaming.shards.prepare import get_index, make_stream, prepare_streams
from examples.mosaic_streaming.shards.stream import CheckedStream
