"""The command line, the files it names, and the loader configuration: read, filled in, refused, explained."""

from examples.mosaic_streaming.config.assets import check_folder, explained
from examples.mosaic_streaming.config.cli import Parser, add_files, parse_flags, parse_known, split_flags
from examples.mosaic_streaming.config.files import LoaderFile, read_loaders, read_toml
from examples.mosaic_streaming.config.folders import (
    check_folders,
    identity,
    is_copy,
    is_url,
    private_root,
    resolved_path,
)
from examples.mosaic_streaming.config.job import BatchShape, Checkpoints, Job, Validation
from examples.mosaic_streaming.config.loader import (
    MAX_RATIO,
    WITHOUT_WORKERS,
    ResolvedLoader,
    dataset_keys,
    resolve,
    takes,
    without_token_ids,
)
from examples.mosaic_streaming.config.streams import Config, has_cache, is_local, stream_defaults, streams_of
from examples.mosaic_streaming.config.values import flat, has_type, type_name
from examples.mosaic_streaming.config.warnings import warnings_of, warnings_of_validation
