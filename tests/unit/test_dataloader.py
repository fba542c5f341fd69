"""Batches, epochs, state and end of the loader: over real streams, in real ranks, by the numbers of the samples."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter
from torchtitan.tools.logging import init_logger
from transformers import AutoTokenizer

from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.dataset import CheckedDataset
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import (
    FIRST_ID,
    SEQ_LEN,
    TOKENIZER,
    build_loader,
    job,
    loader_config,
    mixture,
    read_samples,
    sample_tokens,
    write_stream,
    write_tokens,
)
from tests.support.titan import IS_0_2, set_value


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return write_stream(tmp_path / "stream", samples=21)


def error_of(build: Callable[[], Any]) -> str:
    """The message of the error that `build` raises in a rank."""

    def run() -> str:
        try:
            build()
        except (ConfigError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    [message] = run_rank_values(run)
    assert isinstance(message, str)
    return message


def first_batch(config: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Any]:
    """The first batch of a loader, in a rank of its own."""
    [batch] = run_rank_values(lambda: next(iter(build_loader(config, job(**options)))))
    return batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_samples_shifted_once(stream: Path, num_workers: int) -> None:
    inputs, labels = first_batch(loader_config(stream, num_workers))
    assert list(inputs) == (["input"] if IS_0_2 else ["input", "positions"])
    for row, sample in enumerate((0, 1)):
        assert inputs["input"][row].tolist() == sample_tokens(sample)[:SEQ_LEN].tolist()
        assert labels[row].tolist() == sample_tokens(sample)[1:].tolist()


def test_batch_is_handed_out_in_a_pipelines_parts(stream: Path) -> None:
    """Of equally many rows, in order; the position is that of whole batches."""

    def read() -> tuple[list[list[int]], list[list[int]], bool]:
        job_config, channel = job(local_batch_size=4), AbortChannel()
        whole = build_loader(loader_config(stream), job_config, channel=channel)
        in_parts = build_loader(loader_config(stream), job_config, channel=channel)
        in_parts._job = dataclasses.replace(in_parts._job, microbatches=2)
        samples = read_samples(whole, 3), read_samples(in_parts, 6)
        return *samples, whole.state_dict() == in_parts.state_dict()

    [(whole, parts, same)] = run_rank_values(read)
    assert [len(part) for part in parts] == [2] * 6
    assert [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)] == whole
    assert same


def edited_assets(folder: Path, old: str, new: str) -> str:
    """A copy of the debug tokenizer's assets with a replacement (regular expression) in tokenizer_config.json."""
    shutil.copytree(TOKENIZER, folder)
    config = folder / "tokenizer_config.json"
    config.write_text(re.sub(old, new, config.read_text()))
    return str(folder)


def test_real_eos_in_the_stream_is_a_target_where_padding_is_eos(tmp_path: Path) -> None:
    """llm-foundry masks each EOS there."""
    eos = AutoTokenizer.from_pretrained(TOKENIZER).eos_token_id
    row = [20, eos, *range(30, 30 + SEQ_LEN - 2), eos]
    job_config = job(local_batch_size=1)
    set_value(
        job_config,
        "model.hf_assets_path",
        edited_assets(tmp_path / "assets", r'("pad_token": )".*?"', r'\1"<|end_of_text|>"'),
    )
    folder = write_tokens(tmp_path / "stream", [row])
    [(_, labels)] = run_rank_values(lambda: next(iter(build_loader(loader_config(folder), job_config))))
    assert labels.tolist() == [row[1:]]


def test_padding_of_texts_tokenized_on_the_fly_is_no_target(tmp_path: Path) -> None:
    texts = ["import os\n", "def long_function(x):\n    return x + x\n" * 4]
    with MDSWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        for text in texts:
            writer.write({"text": text})
    inputs, labels = first_batch(loader_config(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)[: SEQ_LEN + 1]
        padded = ids + [tokenizer.pad_token_id] * (SEQ_LEN + 1 - len(ids))
        assert inputs["input"][row].tolist() == padded[:SEQ_LEN]
        assert labels[row].tolist() == (ids[1:] + [-100] * SEQ_LEN)[:SEQ_LEN]
    assert (labels[0] == -100).any()
    assert not (labels[1] == -100).any()


def test_samples_of_seq_len_tokens_need_max_seq_len_set(tmp_path: Path) -> None:
    folder = write_stream(tmp_path, samples=4, length=SEQ_LEN)
    message = error_of(lambda: build_loader(loader_config(folder)))
    assert f"Set dataset.max_seq_len = {SEQ_LEN} in loader.toml" in message
    inputs, labels = first_batch(loader_config(folder, max_seq_len=SEQ_LEN))
    assert inputs["input"][1].tolist() == sample_tokens(1, SEQ_LEN).tolist()
    assert labels[1].tolist() == [*sample_tokens(1, SEQ_LEN)[1:], -100]


@pytest.mark.parametrize(
    ("columns", "num_workers"),
    [
        ({"tokens": "ndarray:int32"}, 2),
        ({"tokens": "bytes"}, 0),
        pytest.param({"tokens": "ndarray:int32"}, 0, marks=pytest.mark.long),
        pytest.param({"tokens": "bytes"}, 2, marks=pytest.mark.long),
    ],
)
def test_samples_that_may_be_cut_are_warned_of_once(tmp_path: Path, num_workers: int, columns: dict[str, str]) -> None:
    with MDSWriter(out=str(tmp_path / "stream"), columns=columns) as writer:
        for sample in range(16):
            tokens = sample_tokens(sample, 2 * SEQ_LEN)
            writer.write({"tokens": tokens.astype(np.int64).tobytes() if "bytes" in columns.values() else tokens})

    def read() -> None:
        init_logger()
        config = loader_config(tmp_path / "stream", num_workers, max_seq_len=SEQ_LEN + 1)
        read_samples(build_loader(config), 4)

    told = f"A sample has {2 * SEQ_LEN} tokens, but the model reads the first {SEQ_LEN + 1} of each"
    assert [rank.output.count(told) for rank in run_ranks(read, 2)] == [1, 0]


def test_texts_that_are_longer_than_a_row_are_warned_of_once(tmp_path: Path) -> None:
    """Tokenized on the fly, where it can't be told before."""
    text = "def long_function(x):\n    return x + x\n" * 4
    with MDSWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        for one in ["short\n", text, text, text]:
            writer.write({"text": one})

    def read(count: int) -> None:
        init_logger()
        read_samples(build_loader(loader_config(tmp_path), job(local_batch_size=1)), count)

    tokens = len(AutoTokenizer.from_pretrained(TOKENIZER).encode(text))
    told = f"A sample has {tokens} tokens, but the model reads the first {SEQ_LEN + 1} of each"
    outputs = [run_ranks(lambda count=count: read(count))[0].output for count in (1, 4)]  # type: ignore[misc]
    assert [output.count("A sample has") for output in outputs] == [0, 1]
    assert told in outputs[1]


def test_token_beyond_the_vocabulary_stops_the_run_with_streams_and_rank(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, [[*range(20, 20 + SEQ_LEN), 4000], [30] * (SEQ_LEN + 1)])
    message = error_of(lambda: next(iter(build_loader(loader_config(folder)))))
    assert message.startswith("DataError: Token id 4000 in a batch, the model knows 0 to 2047.")
    assert f"Rank 0 (dp rank 0) reads {{'dataset': '{folder}" in message


def test_data_parallel_ranks_share_out_an_epoch(stream: Path) -> None:
    per_rank = run_rank_values(lambda: read_samples(build_loader(loader_config(stream, shuffle=True)), 5), 2)
    first, second = (set(np.ravel(samples).tolist()) for samples in per_rank)
    assert len(first) == len(second) == 10
    assert not first & second


def read_and_close(loader: MosaicDataLoader, batches: int) -> list[list[int]]:
    """The samples of a loader's next batches; then it is closed, for another in the same ranks."""
    samples = read_samples(loader, batches)
    loader.close()
    return samples


def test_ranks_of_one_data_parallel_rank_get_the_same_samples(stream: Path) -> None:
    """As tensor-parallel peers, who are neighbours; as pipeline peers, who are not; and as peers all."""
    layouts = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]

    def read_in_each() -> list[list[list[int]]]:
        config, channel = loader_config(stream, shuffle=True), AbortChannel()
        return [read_and_close(build_loader(config, dp_ranks=dp_ranks, channel=channel), 5) for dp_ranks in layouts]

    for dp_ranks, per_rank in zip(layouts, zip(*run_rank_values(read_in_each, 4), strict=True), strict=True):
        for dp_rank in set(dp_ranks):
            peers = [samples for samples, of in zip(per_rank, dp_ranks, strict=True) if of == dp_rank]
            assert all(peer == peers[0] for peer in peers), dp_ranks
        distinct = {sample for samples in per_rank for sample in np.ravel(samples).tolist()}
        assert len(distinct) == 10 * len(set(dp_ranks)), f"{dp_ranks}: different dp ranks read different samples"


def test_epochs_roll_over_for_ever_in_whole_global_batches(stream: Path) -> None:
    """Without workers, with two that live on, and with two that are started anew."""
    configs = [
        loader_config(stream, num_workers, shuffle=True) | {"persistent_workers": persistent_workers}
        for num_workers, persistent_workers in ((0, False), (2, True), (2, False))
    ]

    def read_each() -> list[list[list[int]]]:
        channel, batches = AbortChannel(), job(2, global_batch_size=4)
        return [read_and_close(build_loader(config, batches, channel=channel), 30) for config in configs]

    [found] = run_rank_values(read_each)
    for samples in found:
        epochs = [np.ravel(samples[begin : begin + 10]).tolist() for begin in (0, 10, 20)]  # 21 samples: 5 x 4, and one
        assert all(len(set(epoch)) == 20 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has its own order"


def test_start_and_end_of_an_epoch_are_logged_on_rank_0_alone(stream: Path) -> None:
    def read() -> None:
        init_logger()
        read_samples(build_loader(loader_config(stream)), 6)

    first, second = run_ranks(read, 2)
    start = "The streams start at sample 0 of epoch 0, of which 5 steps follow; it leaves out 1 of 21 samples ("
    assert f"WARNING - {start}" in first.output, "more than one per cent is left out"
    assert (
        ". In all, 10,000 steps (training.steps) read 40,000 samples, 640,000 tokens, 2000.00 epochs." in first.output
    )
    assert "Epoch 0 of the streams ends: 20 samples read, in 5 steps, 320 tokens." in first.output
    assert "epoch 0" not in second.output.lower()


def test_end_of_an_epoch_is_logged_also_where_a_run_ends_with_it(stream: Path) -> None:
    def read() -> None:
        init_logger()
        loader = build_loader(loader_config(stream))
        read_samples(loader, 10)
        loader.close()

    [rank] = run_ranks(read)
    assert "Epoch 0 of the streams ends: 20 samples read, in 10 steps, 320 tokens.\n" in rank.output


def test_log_of_a_start_in_the_middle_of_an_epoch_says_what_is_its_own(stream: Path) -> None:
    _, state = saved_after(loader_config(stream), 3, None)

    def read() -> None:
        init_logger()
        loader = build_loader(loader_config(stream))
        loader.load_state_dict(state)
        read_samples(loader, 18)

    [rank] = run_ranks(read)
    assert ". 6 samples were read before this start." in rank.output and "(training.steps)" not in rank.output
    ends = "Epoch 0 of the streams ends: 14 samples read since this start, at sample 6, in 7 steps, 224 tokens.\n"
    assert ends in rank.output
    assert "Epoch 1 of the streams ends: 20 samples read, in 10 steps, 320 tokens.\n" in rank.output


def test_no_step_mixes_epochs_where_streams_end_before_a_whole_one(tmp_path: Path) -> None:
    """7 and 13 samples in global batches of 4, which leave out a part of each stream."""
    for name, samples in (("a", 7), ("b", 13)):
        write_stream(tmp_path / name, samples)
    streams = {name: {"local": str(tmp_path / name)} for name in ("a", "b")}

    def read(batching_method: str, channel: AbortChannel) -> list[tuple[int, int]]:
        config = mixture(streams, num_canonical_nodes=1, batching_method=batching_method)
        loader = build_loader(config, job(2, global_batch_size=4), channel=channel)
        positions = []
        for _, _ in zip(loader, range(24), strict=False):
            position = json.loads(loader.state_dict()["mosaic"])
            positions.append((position["epoch"], position["sample_in_epoch"]))
        loader.close()
        return positions

    def read_each() -> list[list[tuple[int, int]]]:
        channel = AbortChannel()
        return [read(batching_method, channel) for batching_method in ("per_stream", "stratified")]

    [found] = run_rank_values(read_each)
    for positions in found:
        for first, second in zip(positions[::2], positions[1::2], strict=True):
            assert second in {(first[0], first[1] + 4), (first[0] + 1, 0)}
            assert first[1] % 4 == 0, "in the middle of a step, the position is its beginning"
        assert positions[-1][0] >= 2


def test_second_iteration_is_refused(stream: Path) -> None:
    def read() -> str:
        loader = build_loader(loader_config(stream))
        read_samples(loader, 1)
        try:
            read_samples(loader, 1)
        except RuntimeError as error:
            return str(error)
        return "no error"

    assert run_rank_values(read) == ["A MosaicDataLoader can be iterated once."]


def test_position_is_neither_changed_while_it_is_read_nor_by_a_state_that_is_refused(stream: Path) -> None:
    def read() -> tuple[str, bool, list[list[int]]]:
        loader = build_loader(loader_config(stream))
        [first] = read_samples(loader, 1)
        saved = loader.state_dict()
        try:
            loader.load_state_dict(saved)
        except RuntimeError as error:
            told = str(error)
        again = build_loader(loader_config(stream))
        before = again.state_dict()
        others: list[dict[str, Any]] = [{"data": {}}, {"sample_in_epoch": 1000}]
        for other in others:
            with pytest.raises((ConfigError, DataError)):
                again.load_state_dict({"mosaic": json.dumps(json.loads(saved["mosaic"]) | other)})
        return told, again.state_dict() == before, [first, *read_samples(again, 1)]

    [(told, is_same, [first, second])] = run_rank_values(read)
    assert told == "A MosaicDataLoader that is iterated can't load another position: build a new one."
    assert is_same and first == second


def test_what_llm_foundry_refuses_is_told_with_the_file(stream: Path) -> None:
    message = error_of(lambda: build_loader(loader_config(stream, eos_token_id=77)))
    assert message.startswith(
        "ConfigError: llm-foundry refuses loader.toml: ValueError: Provided eos_token_id=77 does not match"
    )


def test_epoch_without_a_whole_global_batch_is_refused(stream: Path) -> None:
    message = error_of(lambda: build_loader(loader_config(stream), job(2, global_batch_size=22)))
    assert message.startswith(
        "ConfigError: An epoch fills no global batch of 22 sequences. Of its samples in loader.toml (dataset 21), "
    )


def test_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path, stream: Path) -> None:
    job_config = job()
    token = '{"added_tokens_decoder": {"2048": {"content": "<one more>", "special": true}},'
    set_value(job_config, "model.hf_assets_path", edited_assets(tmp_path / "assets", "^{", token))
    message = error_of(lambda: build_loader(loader_config(stream), job_config))
    assert "has 2049 entries, the embedding of llama3_mosaic debugmodel has 2048 rows" in message


def test_tokenizers_that_differ_are_refused(tmp_path: Path, stream: Path) -> None:
    job_config = job()
    set_value(
        job_config,
        "model.hf_assets_path",
        edited_assets(tmp_path / "assets", "PreTrainedTokenizerFast", "LlamaTokenizerFast"),
    )
    message = error_of(lambda: build_loader(loader_config(stream), job_config))
    assert "read the tokenizer in model.hf_assets_path" in message


def test_dataset_of_hugging_face_is_refused(tmp_path: Path) -> None:
    config = {"name": "finetuning", "dataset": {"hf_name": str(tmp_path), "split": "train"}}
    assert "is not a stream. Convert it to MDS" in error_of(lambda: build_loader(config))


def saved_after(config: dict[str, Any], batches: int, state: dict[str, str] | None) -> tuple[list[Any], dict[str, str]]:
    """Read some batches, from a saved state on if there is one; return the samples and the state after them."""

    def read() -> tuple[list[list[int]], dict[str, str]]:
        loader = build_loader(config)
        if state:
            loader.load_state_dict(state)
        return read_samples(loader, batches), loader.state_dict()

    [(samples, saved)] = run_rank_values(read)
    return samples, saved


@pytest.mark.parametrize("num_workers", [0, 2])
def test_position_survives_a_restart(stream: Path, num_workers: int) -> None:
    """10 batches are an epoch; a restored loader reads what one that never stopped reads."""
    config = loader_config(stream, num_workers, shuffle=True)
    saved_after = [0, 1, 9, 10, 11, 20]

    def read_whole() -> tuple[list[list[int]], list[dict[str, str]]]:
        loader = build_loader(config)
        samples, states = [], [loader.state_dict()]
        for (inputs, _), _ in zip(loader, range(35), strict=False):
            samples.append((inputs["input"][:, 0] - FIRST_ID).tolist())
            states.append(loader.state_dict())
        return samples, states

    [(whole, states)] = run_rank_values(read_whole)

    def read_rest(state: dict[str, str], channel: AbortChannel) -> list[list[int]]:
        loader = build_loader(config, channel=channel)
        loader.load_state_dict(state)
        samples = read_samples(loader, 15)
        loader.close()
        return samples

    def read_rests() -> list[list[list[int]]]:
        channel = AbortChannel()
        return [read_rest(states[batches], channel) for batches in saved_after]

    [rests] = run_rank_values(read_rests)
    for batches, rest in zip(saved_after, rests, strict=True):
        assert rest == whole[batches : batches + 15], f"saved after {batches} batches"


def test_state_is_one_readable_string_and_the_same_from_each_rank(stream: Path) -> None:
    def save() -> dict[str, str]:
        loader = build_loader(loader_config(stream, num_workers=2))
        read_samples(loader, 2)
        return loader.state_dict()

    first, second = run_rank_values(save, 2)
    assert first == second
    [state] = map(json.loads, first.values())
    assert state["epoch"] == 0
    assert state["sample_in_epoch"] == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_that_ends_early_is_an_error(stream: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """Whyever: here, the dataset gives each reader 5 samples."""
    each = CheckedDataset._each_sample_id
    monkeypatch.setattr(CheckedDataset, "_each_sample_id", lambda self, it: itertools.islice(each(self, it), 5))
    message = error_of(lambda: read_samples(build_loader(loader_config(stream, num_workers)), 10))
    assert re.match(r"DataError: Epoch 0 ended after \d+ of 21 samples\. Rank 0", message)


def test_close_ends_the_workers(stream: Path) -> None:
    def read() -> tuple[list[str], list[str]]:
        loader = build_loader(loader_config(stream, num_workers=2))
        read_samples(loader, 1)
        running = children()
        loader.close()
        return running, children()

    [(running, closed)] = run_rank_values(read)
    assert len(running) == len(closed) + 2


def children() -> list[str]:
    """The pids of this process's children."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
