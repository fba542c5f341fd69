"""Reads the command line and the configuration files, and turns them into immutable values.

`parse_flags` reads the command line, `read_loaders` the loaders' files (`LoaderFile`), and `resolve` completes such a
file to a `ResolvedLoader`. What is wrong raises ConfigError (the checks are in `keys.py`, `values.py`, `streams.py` and
`folders.py`), and what is doubtful is in `warnings_of`. `Job` is what this project knows of TorchTitan's job config.
"""

from examples.mosaic_streaming.config.assets import check_assets, explain_asset_errors, tokenizer_config
from examples.mosaic_streaming.config.cli import Parser, parse_flags
from examples.mosaic_streaming.config.files import LoaderFile, read_toml
from examples.mosaic_streaming.config.folders import check_folders, identity, is_copy, is_url, private_root
from examples.mosaic_streaming.config.job import BatchShape, Checkpoints, Job, Validation
from examples.mosaic_streaming.config.keys import MAX_RATIO
from examples.mosaic_streaming.config.loader import WITHOUT_WORKERS, ResolvedLoader, resolve, without_token_ids
from examples.mosaic_streaming.config.plan import (
    Plan,
    Skip,
    Stage,
    check_files,
    joined,
    read_loaders,
    read_plan,
    resolve_stages,
    warnings_of_plan,
)
from examples.mosaic_streaming.config.signatures import STREAM_DEFAULTS
from examples.mosaic_streaming.config.streams import complete_streams, is_local, source_of, streams_of
from examples.mosaic_streaming.config.values import flat, refuse, wrong_value
from examples.mosaic_streaming.config.warnings import warnings_of, warnings_of_validation
