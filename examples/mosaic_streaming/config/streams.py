"""The streams of a loader configuration: their settings, folders and weights."""

import os
from typing import Any

from examples.mosaic_streaming.config.files import expand_path
from examples.mosaic_streaming.config.folders import Folder, check_folders, default_cache, is_copy, is_url
from examples.mosaic_streaming.config.signatures import STREAM_DEFAULTS
from examples.mosaic_streaming.errors import ConfigError

Config = dict[str, Any]  # settings by name, as in a TOML file

WEIGHT_TOLERANCE = 0.01  # how far the sum of all proportions may be from 1, as people round


def streams_of(dataset: Config) -> dict[str, Config]:
    """Return the sections of the streams by name; a single stream may have its settings in `dataset` itself."""
    return dataset.get("streams") or {"dataset": dataset}


def complete_streams(dataset: Config) -> dict[str, Config]:
    """The settings of the streams by name, with those that they take over from `dataset`."""
    shared = STREAM_DEFAULTS | {key: dataset[key] for key in STREAM_DEFAULTS if key in dataset}
    return {name: shared | stream for name, stream in streams_of(dataset).items()}


def source_of(stream: Config) -> str:
    """The URL or path that a stream's shards come from; empty where neither is given."""
    return with_split(stream.get("remote") or stream.get("local"), stream)


def with_split(place: str | None, stream: Config) -> str:
    """The folder of a stream's split in a place; empty where there is no place."""
    return os.path.join(place, stream["split"]) if place and stream["split"] else place or ""


def is_local(stream: Config) -> bool:
    """Return whether a stream's shards come from a folder of this machine, rather than from a store."""
    return not is_url(stream.get("remote") or "")


def has_cache(stream: Config) -> bool:
    """Return whether a stream's `local` is a copy of its `remote`, rather than all there is."""
    return is_copy(stream.get("remote"), stream.get("local"), stream["split"])


def folders_of(dataset: Config, path: str) -> list[Folder]:
    """Where each stream lies."""
    found = []
    for name, stream in complete_streams(dataset).items():
        local, source = with_split(stream.get("local"), stream), source_of(stream)
        source = os.path.realpath(source) if is_local(stream) else source.rstrip("/")
        found.append(Folder(name, path, local, source, has_cache(stream)))
    return found


def expand_folders(dataset: Config, path: str) -> None:
    """Write out the folders of streams: full paths, each cache, and no `remote` that is `local` by another name."""
    for section in (dataset, *streams_of(dataset).values()):
        for key in ("remote", "local", "split"):
            if section.get(key) == "":  # which stands for none in YAML files
                del section[key]
            elif section.get(key) and key != "split":
                section[key] = expand_path(section[key], f"`{key}` in {path}")
    for name, stream in streams_of(dataset).items():
        if stream.get("remote") and not stream.get("local"):
            stream["local"] = default_cache(stream["remote"])
        elif stream.get("remote") and not has_cache(complete_streams(dataset)[name]):
            stream["remote"] = stream["local"]  # streaming compares the two as strings


def check_streams(dataset: Config, path: str) -> None:
    """Write out the folders of streams, and raise ConfigError if they, their weights or a cache limit are wrong."""
    expand_folders(dataset, path)
    if "hf_name" in dataset:
        raise ConfigError(f"dataset.hf_name = {dataset['hf_name']!r} in {path} is not a stream. Convert it to MDS.")
    for name, stream in complete_streams(dataset).items():
        if not (folder := source_of(stream)):
            raise ConfigError(f"{name} in {path} has no `local` or `remote`: set the folder or URL of the stream.")
        if dataset.get("cache_limit") and not has_cache(stream):
            raise ConfigError(
                f"dataset.cache_limit in {path}, but {name} has no `remote` beside its `local`: streaming would delete "
                "its only copy. Remove the limit, or give a `remote` and another `local`."
            )
        if is_local(stream) and not os.path.isfile(os.path.join(folder, "index.json")):
            raise ConfigError(
                f"No index.json in {folder} ({name} in {path}). Set `local`, `remote` and `split` to an MDS stream, "
                "or make the demo data: python -m examples.mosaic_streaming.make_demo_data"
            )
    check_weights(dataset, path)
    check_folders(folders_of(dataset, path))


def check_weights(dataset: Config, path: str) -> None:
    """Raise ConfigError unless the proportions of all streams sum to 1; streaming would take them as ratios."""
    shares = {name: stream["proportion"] for name, stream in streams_of(dataset).items() if "proportion" in stream}
    without = [name for name in streams_of(dataset) if name not in shares]
    listed = ", ".join(f"{name} {share}" for name, share in shares.items())
    if shares and without:
        raise ConfigError(
            f"In {path} some streams have a `proportion` ({listed}), and some have none ({', '.join(without)}). Give "
            "one to each, or `repeat` or `choose` to any."
        )
    if shares and abs(sum(shares.values()) - 1) > WEIGHT_TOLERANCE:
        raise ConfigError(
            f"The proportions of the streams in {path} ({listed}) sum to {sum(shares.values()):g}, not 1. Change them: "
            "they are parts of the whole."
        )
