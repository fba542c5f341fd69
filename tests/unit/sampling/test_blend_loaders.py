"""What loaders hand out in the order "blend", on any ranks and machines, and after a resume: against its definition."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.checkpoint.state import STATE_KEY
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.checkpoint import checkpoint_of_start, history_of_start
from examples.mosaic_streaming.preview.job_data import JobData
from tests.support.looking import with_job_data
from tests.support.ranks import can_make_nodes, run_rank_values, run_ranks
from tests.support.reading import write_turns
from tests.support.streams import (
    FIRST_ID,
    SEQ_LEN,
    WEIGHTS,
    Reading,
    Turn,
    build_loader,
    job,
    loader_config,
    mixture,
    read_each,
    read_steps,
    resolved,
    weigh,
    write_stream,
)
from tests.unit.sampling import plain_blend

NEEDS_NODES = pytest.mark.skipif(not can_make_nodes(), reason="nodes need namespaces, of root or of users")

STEPS = 18
"""Of 8 sequences: 144 samples of streams of 50 and 33."""

BLEND: dict[str, Any] = {"batching_method": "blend", "shuffle_block_size": 20}

SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_canonical_nodes": 1},
    {"num_canonical_nodes": 64},
    {"shuffle": False},
    {"shuffle_seed": 1},
    {"shuffle_block_size": 1 << 18},
]
"""Other settings of `dataset`."""


def blended(streams: dict[str, dict[str, Any]], num_workers: int = 0, **dataset: Any) -> dict[str, Any]:
    """A mixture in this order."""
    return mixture(streams, num_workers, **BLEND | dataset)


def shards_of(folder: str) -> list[int]:
    """Samples of each shard of a stream."""
    return [shard["samples"] for shard in json.loads(Path(folder, "index.json").read_text())["shards"]]


def defined(config: dict[str, Any], shares: list[float], positions: int) -> list[int]:
    """The samples of a mixture by the definition, given the shares of its streams."""
    dataset, streams, first = config["dataset"], [], 0
    for stream, share in zip(dataset["streams"].values(), shares, strict=True):
        shards = shards_of(stream["local"])
        streams.append((first, shards, round(share * 2**53)))
        first += sum(shards)
    block = dataset["shuffle_block_size"] if dataset["shuffle"] else 0
    seed = dataset.get("shuffle_seed", 9176)
    return plain_blend.blend(streams, dataset["num_canonical_nodes"], seed, block, positions)


def batches(samples: list[int], total: int = 8) -> list[list[int]]:
    """Samples by their global batches, sorted in each."""
    return np.sort(np.reshape(samples, (-1, total)), axis=1).tolist()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_samples_are_those_of_the_definition(streams: dict[str, dict[str, Any]], weights: str) -> None:
    shares = {"proportion": [0.25, 0.75], "repeat": [75 / 91, 16 / 91], "choose": [61 / 81, 20 / 81]}
    configs = [blended(weigh(streams, weights), **settings) for settings in SETTINGS]
    for config, reading in zip(configs, read_each([Turn(config, STEPS) for config in configs]), strict=True):
        wanted = defined(config, shares.get(weights, [50 / 83, 33 / 83]), STEPS * 8)
        assert reading.samples == batches(wanted), config
        assert json.loads(reading.states[-1]["mosaic"])["sample_in_epoch"] == STEPS * 8


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (1, 2))])
def test_global_batches_are_the_same_for_any_ranks_workers_and_accumulation(
    streams: dict[str, dict[str, Any]], first: int
) -> None:
    def read(num_workers: int = 0, total: int = 8, **layout: Any) -> list[Reading]:
        turns = [Turn(blended(streams, num_workers, **one), STEPS * 8 // total) for one in SETTINGS[first::3]]
        return read_each(turns, total=total, **layout)

    one = read()
    assert read(num_workers=2, dp_ranks=range(4), local=2) == one
    assert read(num_workers=3, dp_ranks=[0, 1, 0, 1], local=1) == one
    assert read(num_workers=1, dp_ranks=[0, 0, 1, 1], local=2) == one
    for fewer, whole in zip(read(total=6, dp_ranks=range(3), num_workers=2), one, strict=True):
        samples = sorted(itertools.chain(*whole.samples))
        assert sorted(itertools.chain(*fewer.samples)) == samples, "another global batch: the same samples"


@pytest.mark.long
@NEEDS_NODES
def test_global_batches_are_the_same_on_two_machines(streams: dict[str, dict[str, Any]]) -> None:
    turns = [Turn(blended(streams, 2, **settings), STEPS) for settings in SETTINGS]
    assert read_each(turns, dp_ranks=range(4), nodes=2, local=2) == read_each(turns)


LAYOUTS: list[tuple[list[int], int]] = [*itertools.product(([0], [0, 1], [0, 1, 0, 1]), (0, 2))]
"""Dp ranks, and dataloader workers."""


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(1, 6))])
def test_resume_at_every_third_step_of_a_pass_and_a_half(streams: dict[str, dict[str, Any]], first: int) -> None:
    """Over all numbers, it is each step, and each setting with each layout."""
    configs = [blended(weigh(streams, [*WEIGHTS][(first + n) % 4]), **one) for n, one in enumerate(SETTINGS)]
    wholes = read_each([Turn(config, STEPS) for config in configs])
    for step in range(1 + first % 3, STEPS, 3):
        dp_ranks, num_workers = LAYOUTS[(step + first) % len(LAYOUTS)]
        turns = [
            Turn(config | {"num_workers": num_workers}, STEPS - step, whole.states[step - 1])
            for config, whole in zip(configs, wholes, strict=True)
        ]
        for whole, rest in zip(wholes, read_each(turns, dp_ranks=dp_ranks, local=2), strict=True):
            assert rest.samples == whole.samples[step:]
            assert rest.states == whole.states[step:]


def test_global_batch_may_change_at_a_resume(streams: dict[str, dict[str, Any]]) -> None:
    config = blended(streams)
    whole = read_steps(config, 15)
    rest = read_steps(config, 6, total=12, state=whole.states[5])
    assert sorted(itertools.chain(*rest.samples)) == sorted(itertools.chain(*whole.samples[6:]))


def test_delivered_shares_are_within_a_sample_at_the_ends_of_blocks(tmp_path: Path) -> None:
    """Of what a loader hands out: the pattern's blocks have 65,536 positions. Each stream's passes are complete."""
    sizes, shares = {"a": 200, "b": 90, "c": 1}, [0.7, 0.29999, 0.00001]
    streams, first = {}, 0
    for (name, size), share in zip(sizes.items(), shares, strict=True):
        write_stream(tmp_path / name, size, first=first)
        streams[name] = {"local": str(tmp_path / name), "proportion": share}
        first += size

    def read() -> list[int]:
        loader = build_loader(blended(streams, num_canonical_nodes=64), job(512))
        found = []
        for batch, _ in itertools.islice(loader, 2 * 65_536 // 512):
            found += (batch["input"][:, 0] - FIRST_ID).tolist()
        return found

    [samples] = run_rank_values(read, timeout=300)
    bounds = np.cumsum([0, *sizes.values()])
    numbers = np.searchsorted(bounds, samples, side="right") - 1
    for stream, share in enumerate(shares):
        counts = (numbers == stream).cumsum()
        off = np.abs(counts - share * np.arange(1, counts.size + 1))
        assert off[65_535] <= 1
        assert off[-1] <= 1
        assert off.max() < 64 * (2 + 3 * share)
        mine = np.array(samples)[numbers == stream]
        size = int(bounds[stream + 1] - bounds[stream])
        passes = np.sort(mine[: len(mine) // size * size].reshape(-1, size), axis=1)
        assert (passes == np.arange(bounds[stream], bounds[stream + 1])).all()


def test_a_stream_of_fewer_samples_than_canonical_nodes_is_read_whole(tmp_path: Path) -> None:
    config = loader_config(write_stream(tmp_path, 60), **BLEND, num_canonical_nodes=64, shuffle=True)
    reading = read_steps(config, 30, dp_ranks=range(2), total=4)
    assert all(sorted(itertools.chain(*reading.samples[at : at + 15])) == [*range(60)] for at in (0, 15))


def test_packed_samples_keep_their_neighbours(tmp_path: Path) -> None:
    """Examples of one batch are packed into its rows, so a rank's batch has to be the same on any ranks."""
    write_turns(tmp_path / "stream", 60)
    dataset = {"remote": str(tmp_path / "stream"), "shuffle": True, "packing_ratio": 2.0, "num_canonical_nodes": 4}
    config = {"name": "finetuning", "num_workers": 0, "dataset": dataset | BLEND}

    def read(world_size: int, num_workers: int) -> list[list[str]]:
        def rows() -> list[list[str]]:
            local = {"dataset": dataset | BLEND | {"local": f"{tmp_path}/cache-{world_size}-{num_workers}"}}
            loader = build_loader(config | local | {"num_workers": num_workers}, job(2, 8))
            found: list[list[str]] = []
            for _ in range(4):
                taken = itertools.islice(iterator, 4 // world_size) if (iterator := iter_of(loader)) else ()
                found.append([str(batch["input"].tolist()) for batch, _ in taken])
            return found

        ranks = run_rank_values(rows, world_size)
        return [sorted(itertools.chain(*(rank[step] for rank in ranks))) for step in range(4)]

    iterators: dict[int, Any] = {}

    def iter_of(loader: Any) -> Any:
        return iterators.setdefault(id(loader), iter(loader))

    one = read(1, 0)
    assert len({*itertools.chain(*one)}) > 8
    assert read(2, 2) == one
    assert read(4, 0) == one


def test_settings_that_mean_nothing_are_refused(streams: dict[str, dict[str, Any]]) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "epoch_size": (100, "its streams go on pass after pass, so there is no epoch"),
        "sampling_method": ("balanced", "a pass reads all samples of its stream"),
        "sampling_granularity": (4, "a pass reads all samples of its stream"),
        "shuffle_algo": ("py1s", "samples are shuffled within blocks, of dataset.shuffle_block_size"),
    }
    with pytest.raises(ConfigError) as error:
        resolved(blended(streams, **{key: value for key, (value, _) in cases.items()}))
    assert str(error.value) == " ".join(
        f"dataset.{key} = {value!r} in loader.toml means nothing with dataset.batching_method = 'blend': {reason}. "
        "Remove it."
        for key, (value, reason) in cases.items()
    )


@pytest.mark.parametrize("method", ["blend", "random"])
@pytest.mark.parametrize("weight", [{"choose": 0}, {"repeat": 0}, {"repeat": 0.001}])
def test_streams_without_samples_are_refused(
    streams: dict[str, dict[str, Any]], method: str, weight: dict[str, Any]
) -> None:
    config = blended({name: stream | weight for name, stream in streams.items()}, batching_method=method)

    def build() -> str:
        with pytest.raises(ConfigError) as error:
            build_loader(config)
        return str(error.value)

    [message] = run_rank_values(build)
    assert message == "The streams in loader.toml give no samples (a 0, b 0). Raise `repeat` or `choose`."


def test_packing_ratio_of_streams_without_samples_is_refused(tmp_path: Path) -> None:
    write_turns(tmp_path / "stream", 8)
    stream = {"remote": str(tmp_path / "stream"), "local": str(tmp_path / "cache"), "repeat": 0}
    dataset = {"streams": {"chats": stream}, "packing_ratio": "auto"}

    def build() -> str:
        with pytest.raises(ConfigError) as error:
            build_loader({"name": "finetuning", "num_workers": 0, "dataset": dataset | BLEND}, job(2, 8))
        return str(error.value)

    [message] = run_rank_values(build)
    assert message == "The streams in loader.toml give no samples (chats 0). Raise `repeat` or `choose`."


def test_shares_alone_count_whatever_they_are_computed_from(streams: dict[str, dict[str, Any]]) -> None:
    """The quotient of 600 and 1000 differs from 0.6 in its last bit, as streaming computes it."""
    ways: list[list[dict[str, float]]] = [
        [{"proportion": 0.6}, {"proportion": 0.4}],
        [{"choose": 600}, {"choose": 400}],
        [{"repeat": 0.6 * 33}, {"repeat": 0.4 * 50}],
    ]
    configs = [
        blended({name: stream | weight for (name, stream), weight in zip(streams.items(), way, strict=True)})
        for way in ways
    ]
    whole = read_steps(configs[0], 20)
    for config in configs[1:]:
        rest = read_steps(config, 10, state=whole.states[9])
        assert rest.samples == whole.samples[10:]


def test_a_checkpoint_of_another_method_is_refused_with_the_table(streams: dict[str, dict[str, Any]]) -> None:
    [state] = read_steps(mixture(streams), 1).states

    def load() -> str:
        loader = build_loader(blended(streams, shuffle_block_size=1_000_000))
        with pytest.raises(ConfigError) as error:
            loader.load_state_dict(state)
        return str(error.value)

    [message] = run_rank_values(load)
    assert message.startswith("The checkpoint was written on other data.")
    rows = [" ".join(line.split()) for line in message.splitlines()[2:-1]]
    assert rows == ["dataset.batching_method random blend"]


def test_log_says_what_a_run_will_read_wherever_it_begins(streams: dict[str, dict[str, Any]]) -> None:
    """At the streams' beginning, or at the position of another run. A run that goes on doesn't say it again."""
    whole, size = read_steps(blended(streams), 30), 8
    state, ids = whole.states[19], np.array([*itertools.chain(*whole.samples)])

    def log(begin: dict[str, str] | None, steps: int, is_new_run: bool = True) -> str:
        def start() -> None:
            init_logger()
            settings = job(size, size)
            settings.training.steps = steps
            loader = build_loader(blended(streams), settings)
            if begin:
                loader.load_state_dict(begin)
            loader.is_new_run = is_new_run
            next(iter(loader))

        [rank] = run_ranks(start)
        assert rank.code == 0, rank.output
        return re.sub(r"\s+", " ", rank.output)

    for begin, steps, read in ((None, 10, ids[:80]), (state, 5, ids[160:200])):
        passes = f"passes a {(read < 50).sum() / 50:.2f}, b {(read >= 50).sum() / 33:.2f}."
        told = f"In all, {steps} steps (training.steps) read {len(read)} samples, {SEQ_LEN * len(read):,} tokens, "
        assert told + passes in log(begin, steps)
    assert "(training.steps)" not in log(state, 25, is_new_run=False)


def test_log_speaks_of_passes(streams: dict[str, dict[str, Any]]) -> None:
    def run() -> dict[str, str]:
        init_logger()
        loader = build_loader(blended(streams), job(8, 8))
        for _ in itertools.islice(loader, 20):
            pass
        state = loader.state_dict()
        loader.close()
        again = build_loader(blended(streams), job(8, 8))
        again.load_state_dict(state)
        next(iter(again))
        again.close()
        return state

    [rank] = run_ranks(run)
    output = rank.output
    assert "Streams, and their part of all samples:" in output
    assert re.search(r"a +50 +800 +60\.24% +83\n", output)
    assert "The streams start at sample 0 of the run: passes a 0.00, b 0.00. In all, " in output
    assert "The streams start at sample 160 of the run: passes a 1.9" in output
    assert "160 samples were read before this start." in output
    assert not re.search("epoch", output.split("Streams, and their part")[1], re.IGNORECASE)


@pytest.mark.parametrize(("samples", "nodes"), [(825, 8), (60, 4), (1984, 64), (1000, 32), (83, 1)])
def test_default_of_canonical_nodes_leaves_out_less_than_a_hundredth(tmp_path: Path, samples: int, nodes: int) -> None:
    config = loader_config(write_stream(tmp_path, samples), shuffle=True)
    del config["dataset"]["num_canonical_nodes"]
    [state] = read_steps(config, 1, total=1).states
    assert json.loads(state[STATE_KEY])["data"]["dataset.num_canonical_nodes"] == nodes
    assert samples % nodes < samples / 100


def test_a_state_that_was_written_with_64_canonical_nodes_goes_on(tmp_path: Path) -> None:
    """As the default was, whatever the data."""
    write_stream(tmp_path, 825)
    explicit = loader_config(tmp_path, shuffle=True, num_canonical_nodes=64)
    whole = read_steps(explicit, 20)
    default = loader_config(tmp_path, shuffle=True)
    del default["dataset"]["num_canonical_nodes"]
    assert read_steps(default, 5).samples != whole.samples[:5]
    for num_workers in (0, 2):
        rest = read_steps(default | {"num_workers": num_workers}, 10, dp_ranks=[0, 1], state=whole.states[9])
        assert rest.samples == whole.samples[10:]
        assert rest.states == whole.states[10:]

    def look(data: JobData) -> list[list[int]]:
        dcp.save({"dataloader": whole.states[9], "train_state": {"step": 10}}, checkpoint_id=tmp_path / "step-10")
        history = history_of_start(data, checkpoint_of_start(data, str(tmp_path / "step-10")))
        assert history
        return [sorted(data.global_batch(step, history)[1].flatten().tolist()) for step in range(11, 21)]

    assert with_job_data(default, look, job(2, 8)) == [sorted(step) for step in whole.samples[10:]]


def test_a_state_with_64_canonical_nodes_is_counted_and_checked_by_them(tmp_path: Path) -> None:
    """As the settings of the run that wrote it: 64 of 100 samples are an epoch."""
    explicit = loader_config(write_stream(tmp_path, 100), shuffle=True, num_canonical_nodes=64)
    saved = json.loads(read_steps(explicit, 13, total=16).states[-1][STATE_KEY])
    assert (saved["epoch"], saved["sample_in_epoch"]) == (3, 16)
    older = {STATE_KEY: json.dumps({key: saved[key] for key in saved if key not in ("seen", "steps", "segments")})}
    default = loader_config(tmp_path, shuffle=True)
    del default["dataset"]["num_canonical_nodes"]

    def load(total: int) -> str:
        loader = build_loader(default, job(total, total))
        loader.load_state_dict(older)
        return loader.state_dict()[STATE_KEY]

    [state] = run_rank_values(lambda: load(16))
    assert json.loads(state)["seen"]["samples"] == 3 * 64 + 16

    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            load(80)
        return str(error.value)

    [message] = run_rank_values(refusal)
    assert message.startswith("An epoch fills no global batch of 80 sequences.")


def test_machines_keep_to_their_own_shards(tmp_path: Path) -> None:
    """Of 8 ranks, one a machine, whose caches are looked at after a pass: each has an eighth of the shards, and a few
    that two share."""
    samples = write_stream(tmp_path / "a", 1600), write_stream(tmp_path / "b", 320, first=1600)
    streams = {folder.name: {"local": str(folder)} for folder in samples}
    config = blended(streams, num_canonical_nodes=64, shuffle_block_size=1 << 18)

    def read() -> set[int]:
        loader = build_loader(config, job(8, 64))
        found: set[int] = set()
        for batch, _ in itertools.islice(loader, 30):
            found |= set((batch["input"][:, 0] - FIRST_ID).tolist())
        return found

    ranks = run_rank_values(read, 8, timeout=300)
    assert 1900 < len(set.union(*ranks)) <= sum(map(len, ranks)) <= 1920, "a pass, and a few samples more or less"
    bounds = np.cumsum([0, *shards_of(streams["a"]["local"]), *shards_of(streams["b"]["local"])])
    shards = [{*np.searchsorted(bounds, [*rank], side="right").tolist()} for rank in ranks]
    assert sum(map(len, shards)) < 1.5 * (len(bounds) - 1)
