"""Resume equals never having stopped: by the samples of each global batch, restored in other processes.

The sweeps over all ways to weigh, batch and shuffle, and over all steps, are marked `long`: `make test-all` runs them.
"""

import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.checkpoint.fingerprint import differences
from examples.mosaic_streaming.checkpoint.state import STATE_VERSION, unpack
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, DataError
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.reading import write_turns
from tests.support.streams import (
    BATCHING,
    SEQ_LEN,
    SHUFFLE,
    TOKENIZER,
    WEIGHTS,
    Turn,
    build_loader,
    job,
    loader_config,
    mixture,
    read_each,
    read_samples,
    read_steps,
    weigh,
    write_stream,
)
from tests.support.titan import set_value

RANKS = {1: [0], 2: [0, 1], 4: [0, 1, 0, 1]}
"""Dp ranks by number of ranks: one; two dp ranks; two with pipeline peers."""


LAYOUTS = [*itertools.product(RANKS.values(), (0, 2))]
"""Dp ranks, and dataloader workers."""

STEPS = 15
"""An epoch and a half: one has 9 or 10 steps. On one rank, four batches are a step; on two dp ranks, two."""


def resume_after(config: dict[str, Any], steps: int, saved_steps: Iterable[int], first: int = 0) -> int:
    """Save at steps, go on from each in fresh processes, on one, two and four ranks and other workers in turn.

    Args:
        config: the loader's.
        steps: to read in all.
        saved_steps: those to go on from.
        first: the number of the first layout.

    Returns:
        how many positions have been restored.
    """
    one = read_steps(config, steps, local=2)
    number = -1
    for number, saved in enumerate(saved_steps):
        state, (dp_ranks, num_workers) = one.states[saved - 1], LAYOUTS[(first + number) % len(LAYOUTS)]
        other = config | {"num_workers": num_workers}
        rest = read_steps(other, steps - saved, dp_ranks=dp_ranks, state=state, local=2)
        assert rest.samples == one.samples[saved:], f"saved at step {saved}, on {dp_ranks}, {num_workers} workers"
        assert rest.states == one.states[saved:]
    return number + 1


@pytest.mark.long
@pytest.mark.parametrize("batching_method", BATCHING)
def test_resume_at_every_step_of_an_epoch_and_a_half(
    streams: dict[str, dict[str, Any]],
    batching_method: str,
) -> None:
    config = mixture(streams, batching_method=batching_method)
    assert resume_after(config, STEPS, range(1, STEPS)) == 14


WAYS = [*itertools.product(WEIGHTS, BATCHING, SHUFFLE)]
"""All ways to weigh, batch and shuffle."""


def steps_to_resume(way: tuple[str, str, str]) -> list[int]:
    """Three of the steps 1 to 14, others for the next way."""
    return [1 + (WAYS.index(way) + 4 * turn) % 14 for turn in range(3)]


def test_over_all_ways_to_read_each_step_is_resumed_with_each_setting_and_layout() -> None:
    resumed = {
        (step, setting)
        for number, way in enumerate(WAYS)
        for turn, step in enumerate(steps_to_resume(way))
        for setting in (*way, (number + turn) % len(LAYOUTS))
    }
    settings = [*WEIGHTS, *BATCHING, *SHUFFLE, *range(len(LAYOUTS))]
    assert resumed == {*itertools.product(range(1, STEPS), settings)}


@pytest.mark.parametrize(
    ("weights", "batching_method", "shuffle_algo"),
    [WAYS[0], *(pytest.param(*way, marks=pytest.mark.long) for way in WAYS[1:])],
)
def test_resume_after_three_steps_in_each_way_to_read(
    streams: dict[str, dict[str, Any]],
    weights: str,
    batching_method: str,
    shuffle_algo: str,
) -> None:
    """Others in each: over all, it is each step with each setting."""
    way = (weights, batching_method, shuffle_algo)
    config = mixture(weigh(streams, weights), batching_method=batching_method, shuffle_algo=shuffle_algo)
    assert resume_after(config, STEPS, steps_to_resume(way), WAYS.index(way)) == 3


@pytest.mark.long
def test_resume_with_other_settings_of_the_sampling(streams: dict[str, dict[str, Any]]) -> None:
    settings: list[dict[str, Any]] = [
        {"shuffle": False},
        {"sampling_method": "fixed"},
        {"sampling_granularity": 4},
        {"epoch_size": 77},
    ]
    configs = [mixture(streams, **setting) for setting in settings]
    whole = read_each([Turn(config, 14) for config in configs])
    for saved in (4, 9, 10):
        turns = [Turn(config, 14 - saved, one.states[saved - 1]) for config, one in zip(configs, whole, strict=True)]
        for setting, one, rest in zip(settings, whole, read_each(turns, dp_ranks=[0, 1]), strict=True):
            assert rest.samples == one.samples[saved:], f"{setting}, saved at step {saved}"


def test_one_two_four_one_ranks_read_what_one_reads(streams: dict[str, dict[str, Any]]) -> None:
    """With tensor and pipeline peers in between, and the whole of a first epoch."""
    config = mixture(streams)
    one = read_steps(config, 16)
    samples: list[list[int]] = []
    state = None
    for dp_ranks in ([0], [0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 0, 1], [0]):
        part = read_steps(config, 3, dp_ranks=dp_ranks, state=state)
        samples, state = samples + part.samples, part.states[-1]
    assert samples == one.samples[:15]


@pytest.mark.parametrize(
    ("batching_method", "local"),
    [("random", None), pytest.param("device_per_stream", 2, marks=pytest.mark.long)],
)
def test_changed_global_batch_loses_and_repeats_nothing_and_is_logged(
    streams: dict[str, dict[str, Any]], batching_method: str, local: int | None
) -> None:
    """Where the batching method doesn't make it a part of the order."""
    config = mixture(streams, batching_method=batching_method)
    first = read_steps(config, 3, total=8, local=local)
    second = read_steps(config, 4, total=12, local=local, state=first.states[-1])
    one = read_steps(config, 18, total=4, local=local)
    read = [sample for step in first.samples + second.samples for sample in step]
    assert sorted(read) == sorted(sample for step in one.samples for sample in step)
    assert len(set(read)) == len(read) == 72

    def load(state: dict[str, str]) -> None:
        init_logger()
        loader = build_loader(config, job(local or 12, 12))
        loader.load_state_dict(state)
        next(iter(loader))

    [rank] = run_ranks(lambda: load(first.states[-1]))
    assert "The global batch changes from 8 to 12 samples: the same samples follow, in other batches." in rank.output
    start = "The streams start at sample 24 of epoch 0, of which 4 steps follow; it leaves out 11 of 83 samples ("
    assert start in rank.output
    [again] = run_ranks(lambda: load(second.states[0]))
    assert "samples were read before this start" in again.output and "The global batch changes" not in again.output
    assert not any("(training.steps) read" in started.output for started in (rank, again)), "as if of one size"


def test_changed_global_batch_is_refused_where_it_is_part_of_the_order(streams: dict[str, dict[str, Any]]) -> None:
    configs = [mixture(streams, batching_method=method) for method in ("per_stream", "stratified")]
    saved = read_each([Turn(config, 1) for config in configs], total=8)
    loads = [(config, one.states[0]) for config, one in zip(configs, saved, strict=True)]
    for message in messages_of_loads(loads, job(12, 12)):
        assert [line.split() for line in message.splitlines()[2:-1]] == [["training.global_batch_size", "8", "12"]]


def test_rest_of_an_epoch_that_fills_no_changed_global_batch_is_left_out(streams: dict[str, dict[str, Any]]) -> None:
    """Without workers, and with two."""
    configs = [mixture(streams, num_workers) for num_workers in (0, 2)]
    wholes = read_each([Turn(config, 12) for config in configs], total=8)
    turns = [Turn(config, 2, whole.states[8]) for config, whole in zip(configs, wholes, strict=True)]
    for whole, rolled in zip(wholes, read_each(turns, total=12), strict=True):
        begins = {sample for step in whole.samples[10:] for sample in step}
        assert set(rolled.samples[0]) < begins, "72 of 80 were read, so the first 12 of the next epoch follow"
        assert len(set(rolled.samples[0] + rolled.samples[1])) == 24


def test_state_is_small_readable_and_names_the_data(tmp_path: Path) -> None:
    [state] = read_steps(loader_config(write_stream(tmp_path, 21)), 1).states
    assert list(state) == ["mosaic"]
    saved = json.loads(state["mosaic"])
    assert saved["version"] == STATE_VERSION
    assert (saved["epoch"], saved["sample_in_epoch"], saved["global_batch_size"]) == (0, 8, 8)
    assert saved["seen"] == {"samples": 8, "tokens": 8 * SEQ_LEN, "targets": None}
    assert saved["data"]["stream 1"]["index"].startswith("21 samples in ")
    assert len(state["mosaic"]) < 1000


def message_of_load(config: dict[str, Any], state: dict[str, str], **options: Any) -> str:
    """What a fresh loader says to a saved state."""
    [message] = messages_of_loads([(config, state)], job(**options))
    return message


def messages_of_loads(loads: list[tuple[dict[str, Any], dict[str, str]]], *job_configs: Any) -> list[str]:
    """What fresh loaders say to saved states, under one job config, or each under its own."""
    jobs = job_configs if len(job_configs) > 1 else job_configs * len(loads)

    def load(config: dict[str, Any], state: dict[str, str], job_config: Any, channel: AbortChannel) -> str:
        try:
            loader = build_loader(config, job_config, channel=channel)
            loader.load_state_dict(state)
            loader.close()
        except (ConfigError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def load_all() -> list[str]:
        channel = AbortChannel()
        return [load(*given, job_config, channel) for given, job_config in zip(loads, jobs, strict=True)]

    [messages] = run_rank_values(load_all)
    return list(messages)


def test_all_that_changes_the_samples_is_told_at_once(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", 50)
    write_stream(tmp_path / "b", 33, first=50)
    streams = {name: {"local": str(tmp_path / name), "repeat": 1} for name in ("a", "b")}
    [state] = read_steps(mixture(streams), 1).states
    write_stream(tmp_path / "c", 40, first=50)
    streams["b"] = {"local": str(tmp_path / "c"), "repeat": 2}
    changed = mixture(
        streams,
        shuffle_seed=5,
        shuffle_algo="py2s",
        num_canonical_nodes=2,
        batching_method="per_stream",
        token_encoding_type="int32",
    )
    message = message_of_load(changed, state, local_batch_size=8, global_batch_size=8)
    assert message.startswith("ConfigError: The checkpoint was written on other data.")
    rows = [line.split() for line in message.splitlines()[1:-1]]
    assert rows[0] == ["setting", "checkpoint", "now"]
    changes = {"_".join(row[:-2]): row[-2:] for row in rows[1:] if row[0] != "stream"}
    assert changes == {
        "dataset.batching_method": ["random", "per_stream"],
        "dataset.num_canonical_nodes": ["4", "2"],
        "dataset.shuffle_seed": ["9176", "5"],
        "dataset.shuffle_algo": ["py1e", "py2s"],
        "dataset.shuffle_block_size": ["1000000", "2000000"],
        "dataset.epoch_size": ["83", "130"],
        "training.global_batch_size_not": ["set", "8"],
        "dataset.token_encoding_type_not": ["set", "int32"],
    }
    streams_told = [" ".join(line.split()) for line in message.splitlines() if "stream" in line]
    assert re.fullmatch(
        r"stream 2 \(b\): index 33 samples in 4 shards, \w+ 40 samples in 4 shards, \w+", streams_told[1]
    )
    assert re.fullmatch(
        r"stream 2 \(b\): an epoch 33 samples, share 0.3975\d+ 80 samples, share 0.6153\d+", streams_told[2]
    )
    assert streams_told[0].startswith("stream 1 (a): an epoch 50 samples, share 0.6024"), "its share has changed"
    assert message.splitlines()[-1].startswith("Restore these in loader.toml and the job config, or start the new data")
    assert "--checkpoint.exclude_from_loading=dataloader" in message


def test_shards_that_are_added_to_a_stream_are_a_change(tmp_path: Path) -> None:
    [state] = read_steps(loader_config(write_stream(tmp_path / "a", 50)), 1).states
    message = message_of_load(loader_config(write_stream(tmp_path / "b", 60)), state)
    assert re.search(r"stream 1 \(dataset\): index +50 samples in 5 shards, \w+ +60 samples in 6 shards, ", message)


def test_other_tokens_in_as_many_samples_are_a_change(tmp_path: Path) -> None:
    """Told by the hashes in the index."""
    [state] = read_steps(loader_config(write_stream(tmp_path / "a", 50)), 1).states
    message = message_of_load(loader_config(write_stream(tmp_path / "b", 50, first=1)), state)
    assert message.count("50 samples in 5 shards, ") == 2


def test_other_sequence_length_and_batch_of_a_device_are_a_change(tmp_path: Path) -> None:
    config = loader_config(write_stream(tmp_path, 50), batching_method="device_per_stream")
    [state] = read_steps(config, 1).states
    shorter = loader_config(tmp_path, batching_method="device_per_stream", max_seq_len=15)
    message = message_of_load(shorter, state, local_batch_size=4, global_batch_size=8, seq_len=14)
    rows = [line.split() for line in message.splitlines()[2:-1]]
    assert rows == [
        ["training.seq_len", "16", "14"],
        ["dataset.max_seq_len", "17", "15"],
        ["training.local_batch_size", "8", "4"],
    ]


def test_each_setting_of_the_order_is_compared(streams: dict[str, dict[str, Any]]) -> None:
    """Against its default, which is the same written out."""
    changes: list[tuple[str, Any, Any]] = [
        ("sampling_method", "balanced", "fixed"),
        ("sampling_granularity", 1, 2),
        ("shuffle_block_size", 1_000_000, 262_144),
        ("epoch_size", 83, 80),
        ("shuffle", True, False),
    ]
    [state] = read_steps(mixture(streams), 1).states
    # streaming takes an epoch_size as another way to weigh streams
    same = [(mixture(streams, **{key: old}), state) for key, old, _ in changes if key != "epoch_size"]
    other = [(mixture(streams, **{key: new}), state) for key, _, new in changes]
    messages = messages_of_loads(same + other, job())
    assert messages[: len(same)] == ["no error"] * len(same)
    for (key, old, new), message in zip(changes, messages[len(same) :], strict=True):
        assert f"dataset.{key} {old} {new}" in " ".join(message.split())


def test_other_types_of_columns_are_a_change(tmp_path: Path) -> None:
    """Of as many bytes each."""
    states = []
    for encoding in ("ndarray:int32", "ndarray:uint32"):
        write_stream(tmp_path / encoding, 20, columns={"tokens": encoding}, hashes=[])
        states += read_steps(loader_config(tmp_path / encoding), 1).states
    assert "stream 1 (dataset): index" in message_of_load(loader_config(tmp_path / "ndarray:int32"), states[1])


def test_tokenizer_is_compared_by_what_decides_ids(tmp_path: Path) -> None:
    changes = [
        ("tokenizer.json", '"merges":', '"merges"  :', "no error"),
        ("tokenizer.json", '"ignore_merges": false', '"ignore_merges": true', "model.hf_assets_path "),
        ("tokenizer_config.json", "{", '{"model_max_length": 77, ', "no error"),
        ("tokenizer_config.json", "{", '{"chat_template": "none", ', "model.hf_assets_path "),
    ]
    config = loader_config(write_stream(tmp_path / "stream", 20))
    [state] = read_steps(config, 1).states
    jobs = []
    for number, (file, old, new, _) in enumerate(changes):
        assets = shutil.copytree(TOKENIZER, tmp_path / f"assets {number}")
        text = (assets / file).read_text()
        assert old in text
        (assets / file).write_text(text.replace(old, new, 1))
        jobs.append(job())
        set_value(jobs[-1], "model.hf_assets_path", str(assets))
    for change, message in zip(changes, messages_of_loads([(config, state)] * len(jobs), *jobs), strict=True):
        assert change[-1] in message, change


@pytest.mark.parametrize("batching_method", ["random", pytest.param("stratified", marks=pytest.mark.long)])
def test_instruction_tuning_resumes_at_every_step(tmp_path: Path, batching_method: str) -> None:
    """Through llm-foundry's other loader, on samples of ids."""
    dataset = {"remote": str(write_turns(tmp_path / "stream", 42)), "local": str(tmp_path / "cache"), "shuffle": True}
    settings = {"num_canonical_nodes": 4, "decoder_only_format": True, "batching_method": batching_method}
    assert resume_after({"name": "finetuning", "dataset": dataset | settings}, 8, range(1, 8)) == 7


def test_what_does_not_matter_is_not_compared(tmp_path: Path) -> None:
    """Another place, another name, workers, caches, retries: the same samples."""
    first = write_stream(tmp_path / "a", 50)
    second = write_stream(tmp_path / "b", 50)
    streams = {"one": {"local": str(first)}}
    config = mixture(streams)
    one = read_steps(config, 5)
    moved = {"two": {"local": str(tmp_path / "cache"), "remote": str(second), "download_retry": 5}}
    other = mixture(
        moved, num_workers=1, predownload=8, cache_limit="1mb", validate_hash="xxh64", partition_algo="orig"
    )
    assert read_steps(other, 4, state=one.states[0]).samples == one.samples[1:]


def position(epoch: object, sample_in_epoch: object, seen: object = None) -> str:
    """A state with this position, and no data."""
    numbers = {"epoch": epoch, "sample_in_epoch": sample_in_epoch, "global_batch_size": 8}
    return json.dumps({"version": STATE_VERSION, **numbers, "seen": seen, "data": {}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "state is damaged: ''."),
        ('{"version": 2, "epo', "state is damaged: "),
        ('{"version": 2, "epoch": "one"}', "state is damaged: "),
        ('{"version": 2, "epoch": 0, "sample_in_epoch": 8, "global_batch_size": 8}', "state is damaged: "),
        ("[]", "state is damaged: "),
        ("[" * 100_000, "state is damaged: "),
        *[(position(*values), "state is damaged: ") for values in ((-1, 0), (0, -8), (10**30, 0), (0.5, 0), (True, 0))],
        (position(0, 8).replace('"global_batch_size": 8', '"global_batch_size": 0'), "state is damaged: "),
        *[
            (position(0, 8, {"samples": 8, "tokens": 128, "targets": 128} | wrong), "state is damaged: ")
            for wrong in ({"samples": -8}, {"tokens": None}, {"targets": 0.5})
        ],
        (position(0, 8, [8, 128, 128]), "state is damaged: "),
        (position(0, 8)[:-1] + ', "skipped": [["1", "2"]]}', "state is damaged: "),
        ('{"version": 4, "place": 8}', f"state is of version 4, this code reads versions {STATE_VERSION} and 3."),
        ('{"version": 3, "place": 8}', "state is damaged: "),
        ('{"version": 1, "position": {}}', f"state is of version 1, this code reads versions {STATE_VERSION} and 3."),
    ],
)
def test_state_that_cannot_be_read_is_refused_with_words(text: str, message: str) -> None:
    with pytest.raises(DataError, match="exclude_from_loading=dataloader") as error:
        unpack({"mosaic": text})
    assert message in str(error.value)


@pytest.mark.parametrize("saved", ["scrambled", {}, None])
def test_stream_that_is_damaged_in_the_state_is_told_as_a_difference(saved: object) -> None:
    [row] = differences({"stream 1": saved}, {"stream 1": {"name": "a", "index": "50 samples"}})
    assert row[0].startswith("stream 1")
    assert row[2] == "50 samples"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def test_any_state_is_taken_or_refused_with_words(tmp_path: Path) -> None:
    """Whatever stands in the string: a place in the data, or one error. Then the loader still reads its own."""
    config = loader_config(write_stream(tmp_path / "stream", 50))
    seen: Counter[str] = Counter()

    def load() -> tuple[Counter[str], list[list[int]]]:
        loader = build_loader(config)
        mine = loader.state_dict()
        saved = json.loads(mine["mosaic"])
        keys = st.sampled_from([*saved, *saved["data"]]) | st.text(max_size=5)

        @settings(max_examples=300, deadline=None, database=None)
        @given(st.text() | JSON.map(json.dumps) | st.dictionaries(keys, JSON, max_size=3))
        def load_any(state: str | dict[str, object]) -> None:
            if isinstance(state, dict):
                inner = {key: value for key, value in state.items() if key in saved["data"]}
                outer = {key: value for key, value in state.items() if key not in inner}
                state = json.dumps({**saved, "data": saved["data"] | inner, **outer})
            try:
                loader.load_state_dict({"mosaic": state})
            except (DataError, ConfigError) as error:
                seen[type(error).__name__] += 1
                assert "checkpoint" in str(error) and "exclude_from_loading=dataloader" in str(error)
            else:
                seen["taken"] += 1
                assert 0 <= json.loads(loader.state_dict()["mosaic"])["sample_in_epoch"] <= 50

        load_any()
        loader.load_state_dict(mine)
        return seen, read_samples(loader, 3)

    [(seen, samples)] = run_rank_values(load)
    assert seen["DataError"] and seen["ConfigError"] and seen["taken"], seen
    assert samples == [[0, 1], [2, 3], [4, 5]]


def test_position_has_to_be_within_an_epoch(tmp_path: Path) -> None:
    config = loader_config(write_stream(tmp_path / "stream", 50), shuffle=True)
    positions = [(0, 48), (0, 56), (1 << 39, 8)]

    def load(epoch: int, sample: int, channel: AbortChannel) -> object:
        loader = build_loader(config, channel=channel)
        saved = json.loads(loader.state_dict()["mosaic"]) | {"epoch": epoch, "sample_in_epoch": sample}
        try:
            loader.load_state_dict({"mosaic": json.dumps(saved)})
        except DataError as error:
            return str(error)
        samples = read_samples(loader, 4)
        loader.close()
        return samples

    def load_all() -> list[object]:
        channel = AbortChannel()
        return [load(*position, channel) for position in positions]

    [(last, beyond, far)] = run_rank_values(load_all)
    for found in (last, far):
        assert len({number for batch in found for number in batch}) == 8
    assert "state is damaged: '56 samples read of an epoch of 50'." in beyond
