"""What TorchTitan's log, TensorBoard and W&B say of the data, against the samples that runs have read.

Here is a stream for instruction tuning, whose samples have known prompts, responses and padding.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer

from examples.mosaic_streaming.checkpoint.progress import Progress
from examples.mosaic_streaming.shards.fetch_stats import RETRY, FetchCounts, FetchStats, count_fetched
from examples.mosaic_streaming.train import main
from tests.support.jobs import JOB, command, train
from tests.support.ranks import run_rank_values, run_ranks, wait_until
from tests.support.reading import TURN
from tests.support.recording import recorded, recording
from tests.support.store import Store, running_store
from tests.support.streams import (
    FIRST_ID,
    SEQ_LEN,
    TOKENIZER,
    build_loader,
    job,
    loader_config,
    mixture,
    read_samples,
    write_stream,
)

SAMPLES = 20
"""Five steps of four are an epoch."""
PAD = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json").token_to_id("<|pad|>")


def prompt(sample: int) -> int:
    """Tokens of a sample's prompt."""
    return 1 + sample % 4


def targets(sample: int) -> int:
    """Tokens of its response, with the EOS that llm-foundry puts behind it."""
    return 2 + 7 * sample % 11


def padding(sample: int) -> int:
    """Positions of its row that are left."""
    return SEQ_LEN - prompt(sample) - targets(sample)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream; a sample's first token tells its number."""
    folder = tmp_path_factory.mktemp("pairs") / "stream"
    with MDSWriter(out=str(folder), columns=dict.fromkeys(TURN, "ndarray:int32"), size_limit=512) as writer:
        for sample in range(SAMPLES):
            tokens = np.full(prompt(sample) + targets(sample) - 1, FIRST_ID + sample, np.int32)
            writer.write({"input_ids": tokens[: prompt(sample)], "labels": tokens[prompt(sample) :]})
    return folder


@pytest.fixture
def tuning(pairs: Path, tmp_path: Path) -> Path:
    """A folder with `job.toml` and `loader.toml`."""
    (tmp_path / "job.toml").write_text(f'[job]\ndump_folder = "{tmp_path}/outputs"\n' + JOB)
    (tmp_path / "loader.toml").write_text(
        f'name = "finetuning"\n[dataset]\nremote = "{pairs}"\nlocal = "{pairs}"\nshuffle = true\n'
        "num_canonical_nodes = 1\ndecoder_only_format = true\n"
    )
    return tmp_path


def scalars(files: Path, folder: str = "tb") -> dict[str, dict[int, float]]:
    """What TensorBoard has got, by name and step."""
    [events] = (files / "outputs" / folder).rglob("events.*")
    found = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def read_by(notes: Path, rank: int, step: int) -> list[int]:
    """The samples that a rank has read in a step, counted from 1."""
    batches = map(json.loads, (notes / f"{rank}.jsonl").read_text().splitlines())
    return [sample for batch in batches if batch["step"] == step - 1 for sample in batch["samples"]]


@pytest.mark.parametrize(
    ("flags", "world_size", "metrics_rank"),
    [
        (["--training.local_batch_size=1"], 1, 0),
        pytest.param(["--training.local_batch_size=2"], 2, 0, marks=pytest.mark.long),
        pytest.param(
            *(["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=2"], 2, 1),
            marks=pytest.mark.long,
        ),
    ],
    ids=["one rank, accumulation", "FSDP 2", "PP 2"],
)
def test_metrics_are_those_of_the_samples_read(
    tuning: Path, flags: list[str], world_size: int, metrics_rank: int
) -> None:
    notes = tuning / "notes"
    with recording(notes):
        # An epoch and two steps.
        ranks = train(tuning, *flags, "--training.steps=7", "--metrics.enable_tensorboard", world_size=world_size)
    found, steps = scalars(tuning), recorded(notes)
    assert [len(step) for step in steps] == [4] * 7
    for step in range(1, 8):
        read = [sample for samples in steps[:step] for sample in samples]
        assert found["data/samples_seen"][step] == len(read)
        assert found["data/tokens_seen"][step] == len(read) * SEQ_LEN
        assert found["data/targets_seen"][step] == sum(map(targets, read))
        mine = read_by(notes, metrics_rank, step)
        share = sum(map(padding, mine)) / len(mine) / SEQ_LEN
        assert found["data/padding(%)"][step] == pytest.approx(100 * share)
        part = step / 5 if step <= 5 else (step - 5) / 5
        assert found["data/epoch"][step] == (step > 5)
        assert found["data/epoch_progress"][step] == pytest.approx(part)
        line = f"epoch: {int(step > 5)} ({part:.1%})  samples: {len(read)}  tokens: {len(read) * SEQ_LEN:,}  "
        assert f"{line}padding: {share:.1%}\n" in ranks[metrics_rank].output
    for key in ("shards_fetched", "bytes_fetched", "retries", "cache_in_use(GiB)"):
        assert set(found[f"data/{key}"].values()) == {0}, "the stream is read where it lies"


def test_without_epochs_metrics_are_passes_over_each_stream(tmp_path: Path) -> None:
    for name, size, first in (("web", 30, 0), ("code", 9, 30)):
        write_stream(tmp_path / name, size, first=first)
    (tmp_path / "job.toml").write_text(f'[job]\ndump_folder = "{tmp_path}/outputs"\n' + JOB)
    streams = "".join(f'[dataset.streams.{name}]\nlocal = "{tmp_path}/{name}"\n' for name in ("web", "code"))
    loader = f'name = "text"\n[dataset]\nshuffle = true\nbatching_method = "blend"\n{streams}'
    (tmp_path / "loader.toml").write_text(loader)
    with recording(tmp_path / "notes"):
        [rank] = train(tmp_path, "--training.steps=12", "--metrics.enable_tensorboard")
    found, seen = scalars(tmp_path), 0
    assert not {"data/epoch", "data/epoch_progress"} & set(found)
    of_web = 0
    for step, samples in enumerate(recorded(tmp_path / "notes"), start=1):
        seen, of_web = seen + len(samples), of_web + sum(sample < 30 for sample in samples)
        assert found["data/passes/web"][step] == pytest.approx(of_web / 30)
        assert found["data/passes/code"][step] == pytest.approx((seen - of_web) / 9)
        line = f"passes: web {of_web / 30:.2f}, code {(seen - of_web) / 9:.2f}  samples: {seen}  "
        assert line in rank.output
    assert of_web > 30


@pytest.mark.long
def test_counts_go_on_over_a_resume_on_other_ranks_with_another_global_batch(tuning: Path) -> None:
    flags = ("--checkpoint.enable", "--checkpoint.interval=3", "--metrics.enable_tensorboard", "--metrics.log_freq=3")
    with recording(tuning / "1"):
        train(tuning, *flags, "--training.steps=3", "--metrics.save_tb_folder=tb1", world_size=2)
    with recording(tuning / "2"):
        train(tuning, *flags, "--training.steps=6", "--metrics.save_tb_folder=tb2", "--training.global_batch_size=8")
    read = [sample for step in recorded(tuning / "1") for sample in step]
    assert scalars(tuning, "tb1")["data/targets_seen"][3] == sum(map(targets, read))
    read += [sample for step in recorded(tuning / "2") for sample in step]
    found = scalars(tuning, "tb2")
    assert list(found["data/targets_seen"]) == [6]
    assert found["data/samples_seen"][6] == len(read) == 3 * 4 + 3 * 8
    assert found["data/tokens_seen"][6] == len(read) * SEQ_LEN
    assert found["data/targets_seen"][6] == sum(map(targets, read))


def tuning_config(pairs: Path) -> dict[str, Any]:
    """A loader of the stream."""
    dataset = {"remote": str(pairs), "local": str(pairs), "num_canonical_nodes": 1, "decoder_only_format": True}
    return {"name": "finetuning", "num_workers": 0, "dataset": dataset}


def test_packed_rows_are_counted_as_rows(pairs: Path) -> None:
    """Each step takes eight samples for its four rows; what finds no room is neither a target nor padding."""
    config = tuning_config(pairs)
    config["dataset"]["packing_ratio"] = 2.0

    def read() -> tuple[list[list[int]], Progress]:
        loader = build_loader(config, job(2, 4))
        batches = iter(loader)
        return [row for _ in range(4) for row in next(batches)[0]["input"].tolist()], loader.progress()

    [(rows, progress)] = run_rank_values(read)
    packed = [sample for row in rows for sample in {token - FIRST_ID for token in row if token >= FIRST_ID}]
    assert 8 < len(packed) < 16, "some have found no room"
    assert progress.seen == (16, 8 * SEQ_LEN, sum(map(targets, packed)))
    assert progress.padding == sum(row.count(PAD) for row in rows) / (8 * SEQ_LEN) > 0


def progress_of(config: dict[str, Any], look_at: list[int], steps: int, state: dict[str, str] | None = None) -> Any:
    """What two ranks save after each step, and what was read, if they look at the progress at some."""

    def read() -> list[tuple[list[int], dict[str, Any], str]]:
        loader = build_loader(config, job(2, 4))
        if state:
            loader.load_state_dict(state)
        batches, notes = iter(loader), []
        for step in range(1, steps + 1):
            samples = (next(batches)[0]["input"][:, 0] - FIRST_ID).tolist()
            if step in look_at:
                loader.progress()
            saved = loader.state_dict()["mosaic"]
            notes.append((samples, json.loads(saved)["seen"], saved))
        return notes

    first, second = run_rank_values(read, 2)
    assert [note[2] for note in first] == [note[2] for note in second], "all ranks save the same"
    read_samples = [one[0] + other[0] for one, other in zip(first, second, strict=True)]
    return read_samples, [note[1] for note in first], [note[2] for note in first]


def test_targets_between_two_logs_are_saved_as_many_as_samples_let_expect(pairs: Path) -> None:
    samples, seen, states = progress_of(tuning_config(pairs), [2, 4], 5)
    assert seen[0] == {"samples": 4, "tokens": 4 * SEQ_LEN, "targets": None}, "nobody has counted"
    counted = [sum(targets(sample) for step in samples[:until] for sample in step) for until in (2, 4)]
    assert counted[0] * 2 != counted[1]
    assert [one["targets"] for one in seen[1:]] == [counted[0], counted[0] * 12 // 8, counted[1], counted[1] * 20 // 16]
    rest, after, _ = progress_of(tuning_config(pairs), [1], 1, {"mosaic": states[2]})
    [on] = after
    assert on["targets"] == counted[0] * 12 // 8 + sum(map(targets, rest[0]))
    assert on["samples"] == 16


def test_state_of_before_it_was_saved_counts_from_its_position(pairs: Path) -> None:
    """Of the second epoch, with another global batch: targets are those of its share since."""
    _, seen, states = progress_of(tuning_config(pairs), [], 7)
    old = {key: value for key, value in json.loads(states[-1]).items() if key != "seen"}
    _, after, _ = progress_of(tuning_config(pairs), [], 1, {"mosaic": json.dumps(old)})
    assert seen[-1] == {"samples": 28, "tokens": 28 * SEQ_LEN, "targets": None}
    assert after == [{"samples": 32, "tokens": 32 * SEQ_LEN, "targets": None}]
    rest, counted, _ = progress_of(tuning_config(pairs), [1], 1, {"mosaic": json.dumps(old)})
    assert counted[0]["targets"] == sum(map(targets, rest[0])) * 32 // 4


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.mark.long
def test_shards_bytes_and_retries_are_those_of_all_workers_of_a_machine(files: Path, store: Store) -> None:
    """Two ranks with two workers each; the store gives half of a shard once. An epoch has 25 steps."""
    remote = store.upload(files / "stream", "stream")
    (files / "loader.toml").write_text(
        f'name = "text"\nnum_workers = 2\n[dataset]\nremote = "{remote}"\nlocal = "{files}/cache"\n'
        "num_canonical_nodes = 1\n"
    )
    store.inject({"path": r"shard\.00003\.mds$", "kind": "truncate", "times": 1})

    def run() -> None:
        os.environ |= store.environment()
        main(command(files, "--training.steps=26", "--metrics.enable_tensorboard"))

    first, second = run_ranks(run, 2)
    assert [first.code, second.code] == [0, 0], first.output + second.output
    assert store.injected() == [1]
    shards = json.loads((files / "stream/index.json").read_text())["shards"]
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    last = {key: steps[26] for key, steps in scalars(files).items()}
    assert (last["data/shards_fetched"], last["data/bytes_fetched"], last["data/retries"]) == (len(shards), size, 1)
    assert last["data/cache_in_use(GiB)"] * (1 << 30) == pytest.approx(size)
    fetched = f"fetched: {len(shards)} shards, 0.000 GB, retries: 1"
    assert f"epoch: 1 (4.0%)  samples: 104  tokens: 1,664  {fetched}\n" in first.output
    ends = f"Epoch 0 of the streams ends: 100 samples read, in 25 steps, 1,600 tokens; {fetched}."
    assert (ends in first.output, ends in second.output) == (True, False)
    assert "padding: " not in first.output
    assert not list(Path("/dev/shm").glob("*_fetched"))


def bytes_of(folder: Path) -> int:
    """Bytes of the shards in a folder, of which some may be evicted meanwhile."""
    size = 0
    for file in folder.glob("shard.*"):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def test_cache_in_use_is_what_is_there(tmp_path: Path) -> None:
    """Also where a file was cut and fetched again; a stream that is read where it lies is no cache."""
    remote, local = write_stream(tmp_path / "remote", 40), write_stream(tmp_path / "local", 20, first=40)
    streams = {"far": {"remote": str(remote), "local": str(tmp_path / "cache")}, "near": {"local": str(local)}}

    def read() -> tuple[int, int]:
        loader = build_loader(mixture(streams), job(4))
        batches = iter(loader)
        for step in range(30):  # two epochs
            next(batches)
            if step == 15:
                os.truncate(tmp_path / "cache/shard.00001.mds", 0)
        dataset: Any = loader._dataset
        return loader.progress().cache, dataset.cache_usage

    [(cache, usage)] = run_rank_values(read)
    assert cache == bytes_of(tmp_path / "cache") == bytes_of(remote)
    assert usage > cache + bytes_of(local), "why streaming's own number isn't shown"


def test_evicted_shards_are_in_no_cache(tmp_path: Path) -> None:
    remote = write_stream(tmp_path / "remote", 100)
    config = loader_config(tmp_path / "cache", remote=str(remote), cache_limit=6000)

    def read() -> None:
        loader = build_loader(config, job(4))
        read_samples(loader, 25)

        def counted() -> bool:
            """Once no thread fetches."""
            return 0 < loader.progress().cache == bytes_of(tmp_path / "cache") < 6000

        wait_until(counted, lambda: f"{loader.progress().cache}, {bytes_of(tmp_path / 'cache')}")

    run_rank_values(read)


def test_processes_count_together_what_they_fetch(tmp_path: Path) -> None:
    path = str(tmp_path / "fetched")
    tally = FetchStats([path])
    assert tally.read() == FetchCounts()

    def fetch() -> None:
        for number in range(300):
            count_fetched(path, RETRY if number % 3 == 0 else 1000 + number)

    each = sum(1000 + number for number in range(300) if number % 3)
    for times in (1, 2):
        run_rank_values(fetch, 4)
        assert tally.read() == FetchCounts(times * 4 * 200, times * 4 * each, times * 4 * 100)


def test_what_cannot_be_counted_is_left_out() -> None:
    count_fetched("/nowhere/fetched", 1)
