"""What `plan` says, against what real loaders read and take, and its warnings, each of which can be had and avoided."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter

from examples.mosaic_streaming.checkpoint import Segment
from examples.mosaic_streaming.config.keys import NOT_WITH_BLEND
from examples.mosaic_streaming.preview import ledger
from examples.mosaic_streaming.preview.__main__ import main
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.ledger import first_repeat, is_repeat
from examples.mosaic_streaming.preview.plan import needs_section, ranges
from tests.support.jobs import command
from tests.support.looking import preview, printed, with_job_data
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import (
    SEQ_LEN,
    WEIGHTS,
    build_loader,
    history,
    job,
    loader_config,
    mixture,
    read_steps,
    sample_tokens,
    write_stream,
)
from tests.support.titan import only_0_2


@pytest.mark.parametrize("batching_method", ["random", "device_per_stream", "blend"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_first_repeat_is_the_first_step_that_reads_a_sample_again(
    streams: dict[str, dict[str, Any]], weights: str, batching_method: str
) -> None:
    weighted = {name: stream | weight for (name, stream), weight in zip(streams.items(), WEIGHTS[weights], strict=True)}
    config = mixture(weighted, batching_method=batching_method)
    read = read_steps(config, 24, local=2).samples
    before = [set(sum(read[:step], [])) for step in range(len(read))]  # noqa: RUF017
    expected = 1 + [
        len(set(step)) < len(step) or bool(seen & set(step)) for seen, step in zip(before, read, strict=True)
    ].index(True)
    assert with_job_data(config, lambda opened: first_repeat(opened, opened.new_run()), job(2, 8)) == (
        expected,
        True,
    )

    def anew(opened: JobData) -> Any:
        return first_repeat(opened, history(opened.opened.order, Segment(0, 0, 0, 8), Segment(2, 0, 0, 8)))

    assert with_job_data(config, anew, job(2, 8)) == (min(3, expected), True), "the streams begin anew after step 2"
    if batching_method == "blend":  # which tells it for any size
        return

    def bound(opened: JobData) -> Any:
        ledger.EXACT = 0
        return first_repeat(opened, opened.new_run()), opened.opened.order.remaining(0) // 8

    (step, exact), steps_per_epoch = with_job_data(config, bound, job(2, 8))
    assert not exact and step <= expected
    assert step == (steps_per_epoch + 1 if weights == "unweighted" else 1)


@given(st.lists(st.integers(0, 20), max_size=40))
def test_sample_is_repeat_if_it_stands_further_to_the_left(samples: list[int]) -> None:
    expected = [sample in samples[:at] for at, sample in enumerate(samples)]
    assert is_repeat(np.array(samples, np.int64), 21).tolist() == expected


@given(st.sets(st.integers(0, 30)))
def test_ranges_are_their_numbers(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    parts = [[int(end) for end in part.split("-")] for part in text.split(", ") if part]
    assert [n for part in parts for n in range(part[0], part[-1] + 1)] == sorted(numbers)
    assert all(first[-1] + 1 < second[0] for first, second in itertools.pairwise(parts)), "as few as there can be"


def test_plan_of_a_stream(files: Path) -> None:
    plan = preview(files, "plan", titan=("--training.steps=40",))
    index = json.loads((files / "stream/index.json").read_text())
    [stream] = plan["streams"]
    assert (stream["samples"], stream["tokens"], stream["passes"]) == (100, 100 * SEQ_LEN, 0.64)
    assert stream["shards"] == len(index["shards"])
    assert stream["bytes"] == sum(path.stat().st_size for path in (files / "stream").glob("*.mds"))
    assert plan["epoch"] == {"samples": 64, "left_out": 36, "steps": 16, "tokens": 64 * SEQ_LEN}
    run = plan["run"]
    assert (run["samples"], run["tokens"], run["epochs"]) == (160, 160 * SEQ_LEN, 2.5)
    assert not run["fits"] and run["first_repeat_step"] == 17
    assert preview(files, "plan", titan=("--training.steps=16",))["run"]["fits"]


def test_plan_of_a_blend_speaks_of_passes(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = files / "loader.toml"
    loader.write_text(loader.read_text() + 'batching_method = "blend"\n')
    plan = preview(files, "plan", titan=("--training.steps=40",))
    [stream] = plan["streams"]
    assert (stream["passes"], stream["passes_of_run"]) == (None, 1.6)
    assert plan["epoch"] is None
    run = plan["run"]
    assert (run["samples"], run["epochs"]) == (160, None)
    assert (run["first_repeat_step"], run["first_repeat_is_exact"], run["fits"]) == (26, True, False)
    assert preview(files, "plan", titan=("--training.steps=25",))["run"]["fits"]
    needs = plan["needs"]
    assert needs["shared_memory_order"] == needs["memory_to_order_an_epoch"] == 0
    settings = {setting["setting"] for setting in plan["settings"]}
    assert not settings & {f"dataset.{key}" for key in NOT_WITH_BLEND} and "dataset.shuffle_block_size" in settings
    said = printed(files, "plan", titan=("--training.steps=40",))
    assert "until the first repeat, in step 26, where a stream begins again" in said
    assert "passes/run" in said and "passes/epoch" not in said
    assert "epoch" not in said.replace("num_epochs", "").replace("epoch_size", ""), said


def test_each_setting_has_the_owner_that_set_it(files: Path) -> None:
    settings = preview(files, "plan", titan=("--training.steps=3", "--checkpoint.no-enable"))["settings"]
    owners = {setting["setting"]: (setting["value"], setting["owner"]) for setting in settings}
    assert owners["dataset.shuffle"] == (True, f"{files}/loader.toml")
    assert owners["dataset.num_canonical_nodes"] == (64, f"{files}/loader.toml")
    assert owners["dataset.batching_method"] == ("random", "streaming's default")
    assert owners["dataset.max_seq_len"] == (SEQ_LEN + 1, "derived from training.seq_len")
    assert owners["dataset.shuffle_seed"] == (9176, "streaming's default")
    assert owners["training.seq_len"] == (SEQ_LEN, f"{files}/job.toml")
    assert owners["training.steps"] == (3, "command line")
    assert owners["checkpoint.enable"] == (False, "command line")
    assert owners["parallelism.tensor_parallel_degree"] == (1, "TorchTitan's default")
    assert len(owners) == len(settings)


def test_ranks_that_share_data_are_named(files: Path) -> None:
    flags = ("--parallelism.tensor_parallel_degree=4", "--parallelism.pipeline_parallel_degree=2")
    layout = preview(files, "plan", "--world-size=16", titan=flags)["layout"]
    assert layout["dp_ranks"] == ["0-3, 8-11", "4-7, 12-15"]
    assert (layout["nodes"], layout["dp_world_size"], layout["batches_per_step"]) == (2, 2, 1)


def test_shared_memory_is_what_a_job_takes(tmp_path: Path) -> None:
    """The order, which is shared while an epoch begins, and the shards' states; what else there is takes less."""
    config = loader_config(write_stream(tmp_path, 2000))
    needs = with_job_data(config, needs_section, job(2, 8))

    def take() -> tuple[int, dict[str, int]]:
        loader = build_loader(config, job(2, 8))
        share = mock.patch.object(loader._dataset, "_share_work", wraps=loader._dataset._share_work).start()
        next(iter(loader))
        number = str(loader._dataset._shm_prefix_int)
        names = [name for name in os.listdir("/dev/shm") if name.startswith(number)]
        return share.call_args.args[0].nbytes, {name: os.stat(f"/dev/shm/{name}").st_size for name in names}

    [(order, taken)] = run_rank_values(take)
    assert order == needs["shared_memory_order"] == 16_000
    states = sum(size for name, size in taken.items() if "shard_" in name)
    assert states == needs["shared_memory_shards"]
    assert sum(taken.values()) - states < 1000


def test_caches_hold_a_machines_share_of_the_shards(files: Path) -> None:
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace("/stream", "/cache") + f'remote = "{files}/stream"\n')
    size = sum(path.stat().st_size for path in (files / "stream").glob("*.mds"))
    flags = ("--training.global_batch_size=64",)
    needs = [preview(files, "plan", f"--world-size={ranks}", titan=flags)["needs"]["cache"] for ranks in (8, 16, 32)]
    assert needs == [size, size // 2, size // 4]


def warned(files: Path, *flags: str, titan: tuple[str, ...] = (), **dataset: Any) -> list[str]:
    """The warnings of a plan with some settings of the dataset; none takes a setting away."""
    settings = {"local": f"{files}/stream", "shuffle": True, "num_canonical_nodes": 1, "validate_hash": "xxh64"}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in (settings | dataset).items() if value is not None]
    (files / "loader.toml").write_text('name = "text"\nnum_workers = 1\n[dataset]\n' + "".join(lines))
    warnings: list[str] = preview(files, "plan", *flags, titan=("--checkpoint.enable", *titan))["warnings"]
    return warnings


def test_plan_without_faults_has_no_warnings(files: Path) -> None:
    assert warned(files) == []


SIXTEEN = ("--world-size=16", "--ranks-per-node=8")
WIDE = ("--training.global_batch_size=32",)


@pytest.mark.parametrize(
    ("flags", "titan", "dataset", "message"),
    [
        ((), (), {"num_canonical_nodes": 64}, "An epoch leaves out 36 of 100 samples"),
        ((), (), {"shuffle": None}, "dataset.shuffle is false"),
        ((), (), {"validate_hash": None}, r"dataset is read without validate_hash: .* The stream has xxh64\."),
        ((), ("--training.steps=200",), {}, r"dataset is read 8\.0 times: beyond about 4 passes"),
        ((), ("--checkpoint.no-enable",), {}, "checkpoint.enable = false: a run that stops begins anew"),
        ((), ("--checkpoint.last_save_model_only",), {}, "last_save_model_only = true, TorchTitan's default"),
        ((), ("--checkpoint.exclude_from_loading=dataloader",), {}, "exclude_from_loading has dataloader"),
        ((), (), {"partition_algo": "orig"}, r"dataset.partition_algo = 'orig' in .*/loader\.toml has no effect: "),
        pytest.param(*((), (), {"eos_token_id": 1}, "does not keep attention within them"), marks=only_0_2),
        (SIXTEEN, WIDE, {"remote": "stream", "num_canonical_nodes": 5}, "num_canonical_nodes = 5 is no multiple of 2,"),
        (
            SIXTEEN,
            WIDE,
            {"remote": "stream", "num_canonical_nodes": 2, "batching_method": "device_per_stream"},
            "each of 2 machines fetches shards of all ranges",
        ),
        ((), (), {"remote": "stream", "cache_limit": 5000}, "cache_limit = 5,000 bytes, but a shuffle over blocks of"),
    ],
)
def test_setting_that_hurts_is_warned_of(
    files: Path, flags: tuple[str, ...], titan: tuple[str, ...], dataset: dict[str, Any], message: str
) -> None:
    if "remote" in dataset:
        dataset = dataset | {"remote": f"{files}/stream", "local": None}
    warnings = warned(files, *flags, titan=titan, **dataset)
    assert [warning for warning in warnings if re.search(message, warning)], warnings


@pytest.mark.parametrize(("seq_len", "rest"), [(32, False), (8, True)])
def test_lengths_with_which_no_job_starts_are_refused(files: Path, seq_len: int, rest: bool) -> None:
    said = printed(files, "plan", titan=(f"--training.seq_len={seq_len}",), code=1)
    assert f"17 tokens, but rows of training.seq_len = {seq_len} take {seq_len + 1} (dataset.max_seq_len)" in said
    assert "Set training.seq_len = 16, or write samples of" in said
    assert ("to leave out the rest" in said) == (f"dataset.max_seq_len = {seq_len + 1} in" in said) == rest
    assert "Checked now" not in said


def test_cache_warning_of_a_blend_adds_up_its_streams_own_blocks(files: Path) -> None:
    write_stream(files / "b", 100)
    streams = [
        f'[dataset.streams.{name}]\nremote = "{files}/{folder}"\nlocal = "{files}/cache/{name}"\nproportion = {share}\n'
        for name, folder, share in (("a", "stream", 0.7), ("b", "b", 0.3))
    ]
    (files / "loader.toml").write_text(
        'name = "text"\n[dataset]\nbatching_method = "blend"\nshuffle = true\nnum_canonical_nodes = 1\n'
        "shuffle_block_size = 180\ncache_limit = 10000\n" + "".join(streams)
    )
    warnings = " ".join(preview(files, "plan")["warnings"])
    assert "cache_limit = 10,000 bytes, but a shuffle over blocks of 154 samples in 1 ranges" in warnings


@pytest.mark.parametrize(("ranges", "told"), [(5, True), (4, False)])
def test_mixture_of_batches_with_fewer_samples_than_ranges_is_warned_of(files: Path, ranges: int, told: bool) -> None:
    write_stream(files / "b", 100)
    (files / "loader.toml").write_text(
        f'name = "text"\n[dataset]\nshuffle = true\nnum_canonical_nodes = {ranges}\n'
        f'[dataset.streams.a]\nlocal = "{files}/stream"\n[dataset.streams.b]\nlocal = "{files}/b"\n'
    )
    warnings = " ".join(preview(files, "plan")["warnings"])
    assert ("A global batch has 4 samples, and dataset.num_canonical_nodes = 5 ranges take turns" in warnings) == told


def test_cache_limit_with_which_no_job_starts_is_refused(files: Path) -> None:
    loader = files / "loader.toml"
    loader.write_text(
        loader.read_text().replace("/stream", "/cache") + f'remote = "{files}/stream"\ncache_limit = 100\n'
    )
    assert "ConfigError: llm-foundry refuses" in printed(files, "plan", code=1)


def test_what_fits_is_not_said_where_repeats_were_not_looked_for(files: Path) -> None:
    (files / "loader.toml").write_text(f'name = "text"\n[dataset.streams.a]\nlocal = "{files}/stream"\nrepeat = 1.5\n')

    def run() -> None:
        ledger.EXACT = 0
        main(["plan", *command(files)])

    [rank] = run_ranks(run)
    assert rank.code == 0 and "repeats were not looked for" in rank.output


def test_no_workers_and_no_shuffle_are_warned_of(files: Path) -> None:
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace("shuffle = true", "shuffle = false"))
    warnings = " ".join(preview(files, "plan")["warnings"])
    assert "num_workers = 0: the training process reads by itself" in warnings
    assert "dataset.shuffle is false" in warnings


def test_samples_of_no_fixed_length_have_no_tokens(files: Path) -> None:
    with MDSWriter(out=str(files / "turns"), columns=dict.fromkeys(("input_ids", "labels"), "ndarray:int32")) as writer:
        for sample in range(100):
            writer.write({"input_ids": sample_tokens(sample)[:4], "labels": sample_tokens(sample)[4:]})
    (files / "loader.toml").write_text(
        f'name = "finetuning"\n[dataset]\nremote = "{files}/turns"\nlocal = "{files}/turns"\n'
    )
    plan = preview(files, "plan")
    assert plan["streams"][0]["tokens"] is plan["run"]["tokens"] is None
    assert "tokens" not in preview(files, "ledger")["streams"][0]
    assert "Samples differ in length" in printed(files, "ledger")


def test_tables_have_all_sections(files: Path) -> None:
    said = printed(files, "plan", "--world-size=2", titan=("--checkpoint.enable", "--training.local_batch_size=1"))
    for title in (
        "Streams",
        "Epoch and run",
        "Layout",
        "Each machine needs",
        "Settings",
        "Checked now",
        "Will be checked",
        "Warnings: ",
    ):
        assert re.search(f"^{title}", said, re.M), title
    now, later = said.split("Will be checked")
    assert "✓ first samples of each stream" in now and "✓" not in later
    assert "· checkpoint, when loaded" in later and "settings of all 2 ranks" in later
    assert "\x1b" not in said


def test_plan_of_batches_of_one_sample_knows_the_first_repeat(files: Path) -> None:
    loader = files / "loader.toml"
    loader.write_text(loader.read_text() + 'batching_method = "blend"\n')
    one = ("--training.local_batch_size=1", "--training.global_batch_size=1", "--training.steps=120")
    assert preview(files, "plan", titan=one)["run"]["first_repeat_step"] == 101
