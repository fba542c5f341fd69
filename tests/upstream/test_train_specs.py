"""TorchTitan's registry takes a name once, and has no public list."""

import pytest
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

from examples.mosaic_streaming.upstream.model_registry import model_names
from examples.mosaic_streaming.upstream.train_specs import register_again


def test_torchtitan_refuses_a_name_that_it_has() -> None:
    first, second = get_train_spec("llama3"), get_train_spec("qwen3")
    register_again("twice", first)
    with pytest.raises(ValueError, match="already registered"):  # or `register_again` is needless
        register_train_spec("twice", second)
    register_again("twice", second)
    assert get_train_spec("twice") is second


def test_a_name_of_somebody_elses_is_not_taken_over() -> None:
    register_train_spec("theirs", get_train_spec("llama3"))
    with pytest.raises(ValueError, match="already registered"):
        register_again("theirs", get_train_spec("qwen3"))


def test_each_listed_model_has_a_spec() -> None:
    assert "llama3" in model_names()
    assert all(get_train_spec(name).model_args for name in model_names())
