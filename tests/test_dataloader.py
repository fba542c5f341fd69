"""Batches, epochs and state of the loader, over real streams, in real ranks."""

from pathlib import Path

from tests.ranks import run_rank_values
from tests.streams import SEQ_LEN, build_loader, loader_config, read_samples, sample_tokens, write_stream


def test_batches_are_the_samples_shifted_once(tmp_path: Path) -> None:
    write_stream(tmp_path / "stream", samples=8)

    def read():
        loader = build_loader(loader_config(tmp_path / "stream"))
        inputs, labels = next(iter(loader))
        return inputs, labels

    [(inputs, labels)] = run_rank_values(read)
    assert inputs.keys() == {"input"}
    for row, sample in enumerate((0, 1)):
        assert inputs["input"][row].tolist() == sample_tokens(sample)[:SEQ_LEN].tolist()
        assert labels[row].tolist() == sample_tokens(sample)[1:].tolist()
