"""TorchTitan 0.2's text models."""

from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from examples.mosaic_streaming.titan.models import check_model
from examples.mosaic_streaming.upstream.model_registry import model_names


def base_spec(name: str) -> TrainSpec:
    """TorchTitan's own spec of a Mosaic model; a ConfigError says which models there are."""
    return get_train_spec(check_model(name, reads_text, model_names()))


def reads_text(name: str) -> bool:
    """Whether TorchTitan has a model of this name that uses its text loader."""
    try:
        return get_train_spec(name).build_dataloader_fn is build_text_dataloader
    except (ValueError, ImportError):  # unknown, or without packages that it needs
        return False
