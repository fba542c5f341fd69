"""Lists the models in TorchTitan's registry, and registers one again.

TorchTitan 0.2.2 has no public list of its models, and refuses to register a name twice (protocols/train_spec.py). A
registry with both makes this module needless.
"""

from torchtitan.models import _supported_models
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

registered: dict[str, TrainSpec] = {}
"""The specs registered here, by name."""


def model_names() -> list[str]:
    """The names of TorchTitan's built-in models."""
    return sorted(_supported_models)


def register_again(name: str, spec: TrainSpec) -> None:
    """Register a spec, replacing one registered here earlier; ValueError if others registered the name."""
    if name in registered and train_spec._extra_train_specs.get(name) is registered[name]:
        del train_spec._extra_train_specs[name]
    register_train_spec(name, spec)
    registered[name] = spec
