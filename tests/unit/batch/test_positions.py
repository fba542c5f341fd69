"""Positions of a model that makes its masks of them, as TorchTitan 0.3's do: 0 begins a document."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.mosaic_streaming.batch.titan_batch import BatchSpec, to_titan_batch
from tests.support.titan import job_config, masking, only_0_3

EOS, PAD = 1, 0
IDS = torch.tensor([[5, 6, EOS, 7, 8, EOS, EOS, 9, 5], [5, 6, 7, 8, 9, 5, 6, 7, PAD]])
SEQUENCE_ID = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, -1]])


def inputs_of(batch: dict[str, Any], labels_are_ids: bool, documents: bool = True) -> dict[str, Tensor]:
    """The inputs of a batch for a model that makes its masks of positions."""
    spec = BatchSpec(
        rows=2, seq_len=8, max_seq_len=9, vocab_size=10, pad_id=PAD, eos_id=EOS, labels_are_ids=labels_are_ids,
        source="", documents=documents, positions=True, masks_by_positions=True,
    )  # fmt: skip
    inputs, _ = to_titan_batch(batch, spec)
    assert list(inputs) == ["input", "positions"], "no other key may reach the model"
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 8) for tensor in inputs.values())
    return inputs


@pytest.mark.parametrize("labels_are_ids", [True, False])
def test_positions_begin_again_with_each_document_of_the_loader(labels_are_ids: bool) -> None:
    found = inputs_of({"input_ids": IDS, "labels": IDS, "sequence_id": SEQUENCE_ID}, labels_are_ids)
    assert found["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]


def test_positions_of_text_without_documents_begin_again_behind_each_eos() -> None:
    found = inputs_of({"input_ids": IDS}, labels_are_ids=True)
    assert found["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_finetuning_row_without_documents_is_one_and_its_padding_another() -> None:
    ids = IDS.clone()
    ids[1, 5:] = PAD
    mask = (ids != PAD).long()
    found = inputs_of({"input_ids": ids, "labels": ids, "attention_mask": mask}, labels_are_ids=False)
    assert found["positions"].tolist() == [[*range(8)], [0, 1, 2, 3, 4, 0, 1, 2]]


def test_positions_run_through_the_row_where_attention_does() -> None:
    found = inputs_of({"input_ids": IDS, "sequence_id": SEQUENCE_ID}, labels_are_ids=True, documents=False)
    assert found["positions"].tolist() == [[*range(8)]] * 2


@only_0_3
@pytest.mark.parametrize("labels_are_ids", [True, False])
def test_masks_of_torchtitan_keep_to_the_documents(labels_are_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the rule written out: a token sees those before it in its document, and itself."""
    decoder = importlib.import_module("torchtitan.models.common.decoder")
    monkeypatch.setattr(decoder, "create_attention_mask", lambda mask_mod, *sizes, **more: mask_mod)  # not compiled
    config = masking(job_config(training__seq_len=8))
    config.model_spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = config.model_spec.model.build()
    found = inputs_of({"input_ids": IDS, "labels": IDS, "sequence_id": SEQUENCE_ID}, labels_are_ids)
    mask = model.get_attention_masks(positions=found["positions"])
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(8), torch.arange(8), indexing="ij")
    documents = SEQUENCE_ID[:, :8]
    same = documents[:, :, None] == documents[:, None, :]
    assert torch.equal(mask(row, torch.tensor(0), query, key), same & (key <= query))
