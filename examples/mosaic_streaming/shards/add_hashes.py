"""Add hashes of its files to a stream's index, so that `validate_hash` can compare contents.

    python -m examples.mosaic_streaming.shards.add_hashes data/from_text

reads every file of a stream in a local folder and rewrites its `index.json`; nothing else is touched. Add hashes to a
stream before you upload it to a store.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from streaming.base.compression import decompress
from streaming.base.hashing import get_hash, get_hashes

from examples.mosaic_streaming.config import Parser
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.index import FILES, FileError, read_index

INDEX = "index.json"


def add_hashes(folder: Path, algorithm: str) -> int:
    """Write the hashes of a stream's files into its index, which is replaced atomically; return the bytes read.

    ConfigError if the folder has no index, DataError if the index is invalid or a file doesn't match it.
    """
    path = folder / INDEX
    if not path.is_file():
        streams = ", ".join(str(found.parent) for found in sorted(folder.glob(f"*/{INDEX}")))
        raise ConfigError(f"No {INDEX} in {folder}{f', but in {streams}: name one of these' if streams else ''}.")
    try:
        read_index(str(path), allow_unsafe_types=True, validate_hash=None)
        index = json.loads(path.read_text(encoding="utf-8"))
        size = sum(hash_shard(folder, shard, algorithm) for shard in index["shards"])
    except FileError as error:
        raise DataError(f"{path} can't get hashes: {error}.") from error
    path = path.resolve()  # keep a link: replace its target
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as private:
        part = Path(private, "part")
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, sort_keys=True))
            file.flush()
            os.fsync(file)
        shutil.copymode(path, part)
        part.replace(path)
    return size


def hash_shard(folder: Path, shard: dict[str, Any], algorithm: str) -> int:
    """Add the hashes of a shard's files to its entry in the index; return the bytes read."""
    size = 0
    for kind in FILES[shard["format"]]:
        raw, packed = shard[f"raw_{kind}"], shard.get(f"zip_{kind}")
        stored = packed or raw
        if not (file := folder / stored["basename"]).is_file():
            raise FileError(f"{stored['basename']} is missing")
        check_size(stored, file.stat().st_size)  # before reading: a wrong file may be huge
        content = file.read_bytes()
        size += len(content)
        if packed:
            add_hash(packed, content, algorithm)
            try:
                content = decompress(shard["compression"], content)
            except Exception as error:  # each library raises its own
                raise FileError(f"{packed['basename']} doesn't decompress: {error}") from error
            check_size(raw, len(content))
        add_hash(raw, content, algorithm)
    return size


def check_size(entry: dict[str, Any], size: int) -> None:
    """Raise FileError unless a file has the size that the index gives."""
    if size != entry["bytes"]:
        raise FileError(f"{entry['basename']} has {size:,} bytes, expected {entry['bytes']:,}")


def add_hash(entry: dict[str, Any], content: bytes, algorithm: str) -> None:
    """Add a file's hash to its entry, or raise FileError if the entry has a different one."""
    hashes = entry.get("hashes") or {}
    found = get_hash(algorithm, content)
    if (known := hashes.get(algorithm, found)) != found:
        raise FileError(f"{entry['basename']} is damaged: its {algorithm} is {found}, expected {known}")
    entry["hashes"] = hashes | {algorithm: found}


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    prog, raw = "python -m examples.mosaic_streaming.shards.add_hashes", argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the stream, with its index.json")
    parser.add_argument("--hash", default="xxh64", help="algorithm (default: %(default)s)")
    try:
        flags = parser.parse_args(argv)
        if flags.hash not in get_hashes():
            raise ConfigError(f"--hash {flags.hash}, expected one of: {', '.join(sorted(get_hashes()))}.")
        size = add_hashes(flags.folder, flags.hash)
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(f"DataError: {flags.folder}: {error}")
    print(
        f"{flags.folder / INDEX} has the {flags.hash} of each file ({size:,} bytes were read). To compare them at "
        f'each start, set validate_hash = "{flags.hash}".'
    )


if __name__ == "__main__":
    main()
