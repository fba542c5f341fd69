"""Lists TorchTitan's models, and those of 0.3 that read text, and their flavors.

TorchTitan has no public list of its models (0.2.2 and 0.3.0). Those of 0.3.0 that read text have a config with its text
loader, and the table of a model's flavors is called after the model (models/*/config_registry.py,
models/*/__init__.py). A registry with all three makes this module needless.
"""

import importlib
from typing import Any

from torchtitan.models import _supported_models


def model_names() -> list[str]:
    """The names of TorchTitan's built-in models."""
    return sorted(_supported_models)


def reads_text(name: str) -> bool:
    """Whether TorchTitan has a model of this name, and a config for it that reads text."""
    try:
        registry = importlib.import_module(f"torchtitan.models.{name}.config_registry")
    except ImportError:  # unknown, or without packages that it needs
        return False
    return hasattr(registry, "HuggingFaceTextDataLoader")


def flavors_of(name: str) -> dict[str, Any]:
    """A model's flavors, each with the function that makes its config."""
    module = vars(importlib.import_module(f"torchtitan.models.{name}"))
    [flavors] = [value for key, value in module.items() if key.endswith("_configs") and isinstance(value, dict)]
    return dict(flavors)
