"""The Mosaic names of TorchTitan's text models: `llama3_mosaic` is that of `llama3`."""

from collections.abc import Callable, Iterable

from examples.mosaic_streaming.errors import ConfigError

SUFFIX = "_mosaic"


def check_model(name: str, reads_text: Callable[[str], bool], models: Iterable[str]) -> str:
    """TorchTitan's name of a Mosaic model; a ConfigError says which `models` there are that read text."""
    base = name.removesuffix(SUFFIX)
    if base != name and reads_text(base):
        return base
    if base == name and reads_text(name):
        raise ConfigError(f"model.name = {name!r} does not read Mosaic streams. Set it to {name + SUFFIX!r}.")
    fault = "does not read Mosaic streams" if base == name else f"but TorchTitan has no text model {base!r}"
    text_models = ", ".join(model + SUFFIX for model in models if reads_text(model))
    raise ConfigError(f"model.name = {name!r}, {fault}. Expected one of: {text_models}.")
