"""TorchTitan's registry of models: which there are, and registering one again.

TorchTitan 0.2.2 has no public list of its models, and refuses to register a name twice (protocols/train_spec.py). A
registry with both makes this module needless.
"""

from torchtitan.models import _supported_models
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

registered: dict[str, TrainSpec] = {}
"""Our own specs, by their names."""


def model_names() -> list[str]:
    """The names of TorchTitan's built-in models."""
    return sorted(_supported_models)


def register_again(name: str, spec: TrainSpec) -> None:
    """Register a spec, in place of an earlier one that was registered here under this name.

    Raises:
        ValueError: the name is somebody else's.
    """
    if name in registered and train_spec._extra_train_specs.get(name) is registered[name]:
        del train_spec._extra_train_specs[name]
    register_train_spec(name, spec)
    registered[name] = spec
