"""What messages are made with, and who prints them."""

import pytest

from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0, text_table


@pytest.mark.parametrize(("rank", "expected"), [(None, True), ("0", True), ("1", False), ("10", False)])
def test_rank_0_and_a_process_without_ranks_print(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, expected: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert is_rank_0() is expected


def test_columns_of_a_table_are_as_wide_as_their_widest_cell() -> None:
    rows = [["dataset.shuffle_seed", "9176", "5"], ["a", "1", ""]]
    assert text_table(["setting", "saved", "now"], rows).splitlines() == [
        "  setting               saved  now",
        "  dataset.shuffle_seed  9176   5",
        "  a                     1",
    ]


def test_row_with_another_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        text_table(["a", "b"], [["1"]])


def test_settings_are_value_errors_and_data_is_a_runtime_error() -> None:
    """For whoever catches them without knowing this package."""
    assert issubclass(ConfigError, ValueError) and issubclass(DataError, RuntimeError)
