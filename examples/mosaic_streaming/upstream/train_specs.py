"""Registers a model in TorchTitan's registry again.

TorchTitan 0.2.2 refuses to register a name twice (protocols/train_spec.py). A registry that allows it makes this module
needless.
"""

from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

registered: dict[str, TrainSpec] = {}
"""The specs registered here, by name."""


def register_again(name: str, spec: TrainSpec) -> None:
    """Register a spec, replacing one registered here earlier; ValueError if others registered the name."""
    if name in registered and train_spec._extra_train_specs.get(name) is registered[name]:
        del train_spec._extra_train_specs[name]
    register_train_spec(name, spec)
    registered[name] = spec
