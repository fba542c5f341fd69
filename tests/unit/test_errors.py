"""What messages are made with."""

import pytest

from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0, text_table


def test_errors_are_of_the_kinds_that_python_has_for_them() -> None:
    assert issubclass(ConfigError, ValueError) and issubclass(DataError, RuntimeError)


@pytest.mark.parametrize(("rank", "expected"), [(None, True), ("0", True), ("1", False)])
def test_rank_0_speaks_and_so_does_a_process_without_a_rank(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, expected: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_rank_0() is expected


def test_table_has_columns_of_equal_width_and_nothing_at_the_ends_of_lines() -> None:
    assert text_table(["a", "long head"], [["longer", "x"], ["y", "z"]]).split("\n") == [
        "  a       long head",
        "  longer  x",
        "  y       z",
    ]
