"""What the model gets from a batch of llm-foundry: compared with labels written by hand."""

import dataclasses

import pytest
import torch

from examples.mosaic_streaming.batch.titan_batch import BatchSpec, to_titan_batch
from examples.mosaic_streaming.errors import DataError

PAD, EOS = 2, 1
SPEC = BatchSpec(
    rows=1,
    seq_len=4,
    max_seq_len=5,
    vocab_size=100,
    pad_id=PAD,
    eos_id=EOS,
    labels_are_ids=True,
    source="Rank 3 reads s3://bucket/web.",
)
PAD_IS_EOS = dataclasses.replace(SPEC, pad_id=EOS)


def labels(row: list[int], spec: BatchSpec = SPEC, mask: list[int] | None = None) -> list[int]:
    batch = {"input_ids": torch.tensor([row])}
    if mask is not None:
        batch["attention_mask"] = torch.tensor([mask])
    return to_titan_batch(batch, spec)[1][0].tolist()


def test_each_label_is_the_next_token() -> None:
    assert labels([10, 11, 12, 13, 14]) == [11, 12, 13, 14]


def test_last_label_of_a_sample_of_seq_len_tokens_is_ignored() -> None:
    assert labels([10, 11, 12, 13], dataclasses.replace(SPEC, max_seq_len=4)) == [11, 12, 13, -100]


def test_only_input_reaches_the_model() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    batch = {"input_ids": ids, "labels": ids, "sequence_id": ids, "attention_mask": ids, "total_tokens": [5]}
    inputs, labels = to_titan_batch(batch, SPEC)
    assert list(inputs) == ["input"]
    assert inputs["input"].tolist() == [[10, 11, 12, 13]]
    assert inputs["input"].dtype == labels.dtype == torch.int64
    assert inputs["input"].is_contiguous() and labels.is_contiguous()


def test_padding_by_attention_mask_is_no_target() -> None:
    assert labels([10, 11, EOS, PAD, PAD], mask=[1, 1, 1, 0, 0]) == [11, EOS, -100, -100]


def test_real_eos_is_a_target_beside_padding_by_the_same_id() -> None:
    assert labels([10, EOS, 12, EOS, EOS], PAD_IS_EOS, mask=[1, 1, 1, 1, 0]) == [EOS, 12, EOS, -100]


def test_trailing_run_of_padding_is_no_target_without_attention_mask() -> None:
    assert labels([10, 11, EOS, PAD, PAD]) == [11, EOS, -100, -100]


def test_padding_token_inside_a_row_is_a_target() -> None:
    assert labels([10, PAD, PAD, 13, 14]) == [PAD, PAD, 13, 14]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([10, 11, 12, 13, EOS], [11, 12, 13, EOS]),
        ([10, EOS, 12, 13, 14], [EOS, 12, 13, 14]),
        ([10, 11, EOS, EOS, EOS], [11, EOS, -100, -100]),
    ],
)
def test_first_eos_of_a_trailing_run_is_real_where_padding_is_eos(row: list[int], expected: list[int]) -> None:
    assert labels(row, PAD_IS_EOS) == expected


def test_without_a_padding_token_nothing_is_padding() -> None:
    assert labels([10, EOS, EOS, EOS, EOS], dataclasses.replace(SPEC, pad_id=None)) == [EOS, EOS, EOS, EOS]


def test_labels_of_a_loader_that_chooses_targets_are_kept() -> None:
    batch = {
        "input_ids": torch.tensor([[10, 11, 12, EOS, PAD]]),
        "labels": torch.tensor([[-100, -100, 12, EOS, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
    }
    _, targets = to_titan_batch(batch, dataclasses.replace(SPEC, labels_are_ids=False))
    assert targets.tolist() == [[-100, 12, EOS, -100]]


def test_samples_one_token_short_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"shape \[1, 4\], expected \[1, 5\].*set dataset.max_seq_len = 4 .*Rank 3"):
        labels([10, 11, 12, 13])


@pytest.mark.parametrize("shape", [(1, 9), (1, 3), (2, 5), (5,)])
def test_wrong_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"Batch of shape .*, expected \[1, 5\] .*s3://bucket/web"):
        to_titan_batch({"input_ids": torch.ones(shape, dtype=torch.int64)}, SPEC)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"Batch of shape \[0, 5\], expected \[1, 5\].*Rank 3"):
        to_titan_batch({"input_ids": torch.ones((0, 5), dtype=torch.int64)}, SPEC)


@pytest.mark.parametrize("token", [100, -1])
def test_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(DataError, match=rf"Token id {token} in a batch, the model knows 0 to 99.*Rank 3 reads s3"):
        labels([10, 11, 12, 13, token])
