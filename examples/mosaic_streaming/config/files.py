"""The files that the command line names: TOML, and llm-foundry's training YAMLs."""

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

from examples.mosaic_streaming.errors import ConfigError, is_rank_0

YAML = (".yaml", ".yml")


class LoaderFile(NamedTuple):
    """A loader's configuration as it was read, and the file that it was read from."""

    config: dict[str, Any]
    path: str


def expand_path(path: str, place: str) -> str:
    """Expand `~` and environment variables in a path or URL, which was given in a place."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~") or re.search(r"\$\w|\$\{", expanded):
        raise ConfigError(f"{place} = {path!r}: there is no such user, or variable in the environment.")
    return expanded


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file, which may begin with a byte order mark; a ConfigError has the path and the line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return tomllib.loads(file.read())
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def print_ignored(read: Sequence[tuple[str, str]]) -> None:
    """Print once, on rank 0, which sections of llm-foundry's YAMLs are ignored; `read` has paths and sections."""
    for path in dict.fromkeys(path for path, _ in read if path.endswith(YAML)):
        sections = list(dict.fromkeys(section for of, section in read if of == path))
        ignored = [str(section) for section in read_yaml(path) if section not in sections]
        if ignored and is_rank_0():
            print(f"{path}: read {', '.join(sections)}, ignored {', '.join(ignored)}.", file=sys.stderr, flush=True)


def read_loader(path: str, section: str) -> LoaderFile:
    """Parse a loader's TOML file, or a section of an llm-foundry training YAML with its interpolations resolved."""
    if not path.endswith(YAML):
        return LoaderFile(read_toml(path), path)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = read_yaml(path)
    try:
        loader = content.get(section)
        loader = OmegaConf.to_container(loader, resolve=True) if OmegaConf.is_config(loader) else loader
    except OmegaConfBaseException as error:
        raise ConfigError(f"{section} in {path}: {' '.join(str(error).split())}.") from error
    if isinstance(loader, list) and len(loader) == 1:  # as llm-foundry may have several evaluations
        [loader] = loader
    if not isinstance(loader, dict):
        found = [str(key) for key in content]
        has = f"has: {', '.join(difflib.get_close_matches(section, found, n=1) or found) or 'nothing'}"
        if isinstance(loader, list):
            has = f"has {len(loader)} of them"
        raise ConfigError(f"{path}: expected one `{section}`, as in an llm-foundry training YAML, but it {has}.")
    loader.pop("label", None)  # the name of an evaluation
    return LoaderFile(without_nulls(loader), path)


def without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """A section without its null values, which mean the default."""
    kept = {key: value for key, value in section.items() if value is not None}
    return {key: without_nulls(value) if isinstance(value, dict) else value for key, value in kept.items()}


def read_yaml(path: str) -> Any:
    """Parse a YAML file into OmegaConf's sections."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content: Any = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return content if OmegaConf.is_dict(content) else OmegaConf.create()
