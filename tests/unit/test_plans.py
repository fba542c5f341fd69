"""Loaders that read a plan: text, a mixture, and packed instruction tuning, with skips, against the definition."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.plan import Plan, Skip, Stage
from examples.mosaic_streaming.distributed.abort import AbortChannel
from tests.support.ranks import can_make_nodes, run_rank_values, run_ranks, wait_until
from tests.support.store import running_store
from tests.support.streams import (
    FIRST_ID,
    Turn,
    build_loader,
    job,
    mixture,
    read_each,
    read_steps,
    sample_tokens,
    write_stream,
)
from tests.unit.sampling import plain_blend
from tests.unit.sampling.test_blend_loaders import shards_of

WEB, CODE, CHAT = range(50), range(50, 83), range(100, 160)
"""The numbers of the streams' samples."""

STEPS, TOTAL, RATIO = 22, 8, 2
SKIPS = (Skip(3, 4, "spike"), Skip(9, 9), Skip(20, 23))
EXAMPLE = 6
"""Tokens of an example: two fit into a row."""


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    for name, numbers in (("web", WEB), ("code", CODE)):
        write_stream(module_path / name, len(numbers), first=numbers[0])
    columns = dict.fromkeys(("input_ids", "labels"), "ndarray:int32")
    with MDSWriter(out=str(module_path / "chat"), columns=columns, size_limit=512, hashes=["xxh64"]) as writer:
        for number in CHAT:
            tokens = sample_tokens(number, EXAMPLE)
            writer.write({"input_ids": tokens[:4], "labels": tokens[4:]})
    return module_path


def loaders(folder: Path, num_workers: int = 0) -> list[dict[str, Any]]:
    """The configurations of the stages."""
    web, code = ({"local": str(folder / name)} for name in ("web", "code"))
    settings: dict[str, Any] = {"batching_method": "blend", "shuffle_block_size": 20}
    mixed = {"web": web | {"proportion": 0.25}, "code": code | {"proportion": 0.75}}
    tuning = {"remote": str(folder / "chat"), "local": str(folder / "chat"), "packing_ratio": RATIO, "shuffle": True}
    return [
        mixture({"web": web}, num_workers, **settings),
        mixture(mixed, num_workers, **settings, shuffle_seed=5) | {"name": "text"},
        {"name": "finetuning", "num_workers": num_workers, "dataset": tuning | settings | {"num_canonical_nodes": 2}},
    ]


def plan_of(
    folder: Path, num_workers: int = 0, skips: Sequence[Skip] = SKIPS, firsts: Sequence[int] = (1, 6, 15)
) -> Plan:
    """The plan of three stages."""
    files = [
        LoaderFile(config, f"{number}.toml") for number, config in enumerate(loaders(folder, num_workers), start=1)
    ]
    stages = [Stage(first, file) for first, file in zip(firsts, files, strict=False)]
    return Plan(tuple(stages), tuple(skips), "plan.toml")


def defined(folder: Path) -> list[list[int]]:
    """The numbers of the samples in each step, sorted, by the definition of the stages' orders."""
    left_out = {number for skip in SKIPS for number in range(skip.first, skip.last + 1)}
    numbers = [number for number in range(1, 40) if number not in left_out][:STEPS]
    found: list[list[int]] = []
    before: dict[int, plain_blend.Before] = {}
    shards = {name: shards_of(str(folder / name)) for name in ("web", "code", "chat")}
    stages = [
        ([(0, shards["web"], 1)], 4, 9176, [0], TOTAL, range(5), WEB),
        ([(0, shards["web"], 1), (50, shards["code"], 3)], 4, 5, [0, 1], TOTAL, range(5, 14), range(83)),
        ([(0, shards["chat"], 1)], 2, 9176, [2], TOTAL * RATIO, range(14, STEPS), CHAT),
    ]
    begin = 0
    for streams, nodes, seed, keys, batch, steps, names in stages:
        end = numbers[steps[-1]]
        ids, before = plain_blend.stage(streams, nodes, seed, 20, (end - begin) * batch, before, keys)
        for number in (numbers[step] for step in steps):
            found.append(
                sorted(names[sample] for sample in ids[(number - begin - 1) * batch : (number - begin) * batch])
            )
        begin = end
    return found


def numbers_in(rows: list[list[int]], step: int) -> list[int]:
    """The numbers of the samples in the rows of a step; those of packed rows lie anywhere in them."""
    if step < 14:
        return sorted(row[0] - FIRST_ID for row in rows)
    begins = {number: str(sample_tokens(number, EXAMPLE)[:EXAMPLE].tolist())[1:-1] for number in CHAT}
    text = str(rows)
    return sorted(number for number, begin in begins.items() for _ in range(text.count(begin)))


Found = tuple[list[list[int]], list[dict[str, str]]]
"""The numbers of the samples in each step, and the state after it."""


def read(
    plan: Plan, begin: int, state: Any = None, dp_ranks: Sequence[int] = (0,), nodes: int = 1, local: int = 2
) -> Found:
    """Read to the last step, in ranks of their own."""
    dp = len(set(dp_ranks))

    def run() -> tuple[list[list[list[int]]], list[dict[str, str]]]:
        loader, steps, states = build_loader(plan, job(local, TOTAL), list(dp_ranks)), [], []
        if state:
            loader.load_state_dict(state)
        batches = iter(loader)
        for _ in range(begin, STEPS):
            micro_batches = itertools.islice(batches, TOTAL // local // dp)
            steps.append([row for one in micro_batches for row in one[0]["input"].tolist()])
            states.append(loader.state_dict())
        loader.close()
        return steps, states

    ranks = run_rank_values(run, len(dp_ranks), nodes)
    assert all(states == ranks[0][1] for _, states in ranks)
    of_dp = {dp_rank: steps for dp_rank, (steps, _) in zip(dp_ranks, ranks, strict=True)}
    rows = [[row for steps in of_dp.values() for row in steps[step]] for step in range(STEPS - begin)]
    return [numbers_in(of_step, step) for step, of_step in enumerate(rows, start=begin)], ranks[0][1]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Found:
    """The run on one rank, without workers."""
    return read(plan_of(folder), 0)


def test_stages_and_skips_read_what_the_definition_says(folder: Path, whole: Found) -> None:
    assert whole[0] == defined(folder)
    state = json.loads(whole[1][-1]["mosaic"])
    assert state["version"] == 3 and [end for end, _ in state["past"]] == [7, 17]
    assert state["skipped"] == [[3, 4], [9, 9], [20, 23]] and state["steps"] == STEPS
    assert state["seen"]["samples"] == 14 * TOTAL + 8 * TOTAL * RATIO
    assert "past" not in json.loads(whole[1][1]["mosaic"]), "the first state is that of a run of one loader"


RANKS = [[0], [0, 1], [0, 1, 2, 3], [0, 1, 0, 1]]
"""The dp ranks of 1, 2 and 4 ranks, and of 4 that are two pairs of peers."""


@pytest.mark.parametrize(
    ("dp_ranks", "steps"),
    [
        ([0, 1], (2, 5, 14, 16)),
        *(pytest.param(dp_ranks, range(1, STEPS), marks=pytest.mark.long) for dp_ranks in RANKS),
    ],
)
def test_resume_at_every_step_on_any_ranks(
    folder: Path, whole: Found, dp_ranks: list[int], steps: Sequence[int]
) -> None:
    for step in steps:
        found = read(plan_of(folder, num_workers=2 * (step % 2)), step, whole[1][step - 1], dp_ranks)
        assert found == (whole[0][step:], whole[1][step:]), step


@pytest.mark.long
@pytest.mark.skipif(not can_make_nodes(), reason="nodes need namespaces, of root or of users")
def test_two_machines_read_the_same_from_the_beginning_and_after_a_resume(folder: Path, whole: Found) -> None:
    assert read(plan_of(folder, 1), 0, None, range(4), nodes=2) == whole
    for step in (5, 9, 13, 14):
        rest = read(plan_of(folder, 1), step, whole[1][step - 1], range(4), nodes=2)
        assert rest == (whole[0][step:], whole[1][step:])


def test_a_run_of_a_loader_file_goes_on_with_a_plan_and_the_reverse(folder: Path, whole: Found) -> None:
    plan = plan_of(folder)
    alone = Plan.of(plan.stages[0].file)
    one, *_ = read_each([Turn(alone, 2)], total=TOTAL, local=8)
    assert one.samples == whole[0][:2]
    assert read(plan, 2, one.states[1])[0] == whole[0][2:]
    [back] = read_each([Turn(alone, 2, whole[1][1])], total=TOTAL, local=8)
    [unskipped] = read_each([Turn(alone, 4)], total=TOTAL, local=8)
    assert back.samples == unskipped.samples[2:], "its skips lie ahead, and are gone"


def refused(plan: Plan, state: dict[str, str], total: int = TOTAL) -> str:
    """Why a loader doesn't load a state."""

    def run() -> None:
        with AbortChannel().report_errors_once():
            build_loader(plan, job(total, total)).load_state_dict(state)

    [rank] = run_ranks(run)
    assert rank.code == 1 and "Traceback" not in rank.output, rank.output
    return rank.output[rank.output.index("ConfigError") :]


def read_anyway(state: dict[str, str], plan: Plan) -> dict[str, str]:
    """A state as a run with skips that are written otherwise has it."""
    saved = json.loads(state["mosaic"])
    skipped = [list(skip[:2]) for skip in plan.skips if [skip.first, skip.last] <= saved["skipped"][-1]]
    return {"mosaic": json.dumps(saved | {"skipped": skipped})}


def test_the_past_is_fixed(folder: Path, whole: Found) -> None:
    plan, state = plan_of(folder), whole[1][7]  # of step 8, which has read batch 11, in stage 2
    assert refused(plan_of(folder, skips=(*SKIPS[:2], Skip(10, 10, "late"), SKIPS[2])), state) == (
        "ConfigError: The skip of batch 10 (late) in plan.toml names batches that have been read: the checkpoint is of "
        "step 8, which read batch 11. Go back to a checkpoint of step 6 or before with --checkpoint.load_step, or "
        "change the skip.\n"
    )
    told = refused(plan_of(folder, skips=SKIPS[1:]), state)
    assert "skipped batches" in told and "3:4, 9:9" in told
    told = refused(plan_of(folder, firsts=(1, 7, 15)), state)
    assert re.search(r"first steps of stages +1, 6 +1, 7\n", told)
    assert "Restore these in plan.toml, 1.toml, 2.toml and the job config" in told
    told = refused(Plan.of(plan.stages[0].file), state)
    assert "Restore these in the plan, which --mosaic-config has to name again, and the job config" in told
    told = refused(Plan(plan.stages[:1], SKIPS, "plan.toml"), state)
    assert re.search(r"first steps of stages +1, 6 +1\n", told)
    told = refused(Plan((*plan.stages[:2], plan.stages[2]._replace(from_step=8)), SKIPS, "plan.toml"), state)
    assert told == (
        "ConfigError: A stage in plan.toml begins at step 8, but the checkpoint is of step 8, and that step was read "
        "from the stage before. Go back to a checkpoint of step 7 or before with --checkpoint.load_step, or change "
        "the stage.\n"
    )
    first = plan.stages[0].file
    other = first._replace(config=first.config | {"dataset": first.config["dataset"] | {"shuffle_seed": 1}})
    told = refused(Plan((Stage(1, other), *plan.stages[1:]), SKIPS, "plan.toml"), state)
    assert "stage 1, dataset.shuffle_seed" in told
    told = refused(Plan((plan.stages[0], plan.stages[1]._replace(restart=("web",)), *plan.stages[2:]), SKIPS), state)
    assert re.search(r"stage 2, streams that begin anew +not set +\[1\]", told)
    told = refused(plan_of(folder, skips=(Skip(3, 3), *SKIPS[1:])), state)
    assert re.search(r"skipped batches +3:4, 9:9 +3:3, 9:9", told), "it was not read"
    split = plan_of(folder, skips=(Skip(3, 3), Skip(4, 4, "other words"), *SKIPS[1:]))
    assert read(split, 8, state) == (whole[0][8:], [read_anyway(one, split) for one in whole[1][8:]])


def test_the_future_is_free_and_the_log_says_what_has_changed(folder: Path, whole: Found) -> None:
    plan, state = plan_of(folder), whole[1][7]
    changed = Plan((*plan.stages[:2], plan.stages[2]._replace(from_step=12)), (*SKIPS[:2], Skip(13, 13)), "plan.toml")

    def run() -> list[int]:
        init_logger()
        loader = build_loader(changed, job(TOTAL, TOTAL))
        loader.load_state_dict(state)
        next(iter(loader))
        return [loader._history.batch(step) for step in (9, 10, 11, 12)]

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    assert rank.value == [12, 14, 15, 16]
    assert "The plan after step 8 has changed. New: stage from step 12, " in rank.output
    assert "skip of batch 13. Gone: stage from step 15, " in rank.output
    assert "skip of batches 20 to 23" in rank.output


def test_another_global_batch_with_skips_ahead_is_refused(folder: Path, whole: Found) -> None:
    told = refused(plan_of(folder), whole[1][7], total=16)
    assert told.startswith("ConfigError: The global batch changes from 8 to 16 samples, so that the numbers of batches")
    past = plan_of(folder, skips=SKIPS[:2])
    turns = [Turn(past, 2, whole[1][7])]
    [found] = read_each(turns, total=16, local=16)
    [same] = read_each([Turn(past, 4, whole[1][7])], total=8, local=8)
    assert found.samples == [sorted(sum(same.samples[n : n + 2], [])) for n in (0, 2)]  # noqa: RUF017


EPOCH = 6
"""Steps of an epoch of `web`, of 48 samples."""


def of_epochs(folder: Path, num_workers: int = 0) -> Plan:
    """A first stage with epochs, which ends within one, and a second one of the same stream, with skips in both."""
    web = {"web": {"local": str(folder / "web")}}
    first, second = mixture(web, num_workers), mixture(web, num_workers, batching_method="blend", shuffle_block_size=20)
    stages = (Stage(1, LoaderFile(first, "1.toml")), Stage(12, LoaderFile(second, "2.toml")))
    return Plan(stages, (Skip(6, 7), Skip(9, 9), Skip(13, 24), Skip(27, 27), Skip(29, 29)), "plan.toml")


NUMBERS = [1, 2, 3, 4, 5, 8, 10, 11, 12, 25, 26, 28, 30, 31]
"""The batches of the plan above that 14 steps read: of the third and fourth epoch, none."""


def test_skips_and_stages_are_exact_where_streams_have_epochs(folder: Path) -> None:
    """Skips of an epoch's last and first batches, of two whole epochs, and of the first batch behind a new stage."""
    plan = of_epochs(folder)
    by_number = [read_steps(stage.file.config, 28).samples for stage in plan.stages]
    wanted = [by_number[0][number - 1] for number in NUMBERS[:11]] + [
        by_number[1][number - 27] for number in NUMBERS[11:]
    ]
    for num_workers in (0, 2):
        whole = read_steps(of_epochs(folder, num_workers), len(NUMBERS), local=2)
        assert whole.samples == wanted
        for step in range(1 + num_workers, len(NUMBERS), 3):
            config = of_epochs(folder, (step + num_workers) % 3)
            rest = read_steps(config, len(NUMBERS) - step, dp_ranks=[0, 1], state=whole.states[step - 1])
            assert (rest.samples, rest.states) == (whole.samples[step:], whole.states[step:]), step


def test_log_says_which_steps_of_an_epoch_its_stage_has(folder: Path) -> None:
    first = mixture({"web": {"local": str(folder / "web")}}, batching_method="random")
    second = mixture({"code": {"local": str(folder / "code")}}, batching_method="blend", shuffle_block_size=20)
    plan = Plan((Stage(1, LoaderFile(first, "1.toml")), Stage(3, LoaderFile(second, "2.toml"))), (), "plan.toml")

    def run() -> None:
        init_logger()
        loader = build_loader(plan, job(TOTAL, TOTAL))
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        loader.close()

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    assert "The streams start at sample 0 of epoch 0, of which 2 steps follow; it leaves out 2 of 50 " in rank.output
    assert "Stage 1 ends: 16 samples read, in 2 steps, " in rank.output


def test_persistent_workers_read_on_where_whole_epochs_are_skipped(folder: Path) -> None:
    config = of_epochs(folder, 1)
    for stage in config.stages:
        stage.file.config["persistent_workers"] = True
    assert read_steps(config, len(NUMBERS)).samples == read_steps(of_epochs(folder), len(NUMBERS)).samples


def cached(folder: Path, cache: Path, *stages: tuple[int, str], **settings: Any) -> Plan:
    """A plan whose stages each read a stream through a cache."""
    found = []
    for first, name in stages:
        streams = {name: {"remote": str(folder / name), "local": str(cache / name)}}
        config = mixture(streams, batching_method="blend", shuffle_block_size=20, **settings)
        found.append(Stage(first, LoaderFile(config, f"{name}.toml")))
    return Plan(tuple(found), (), "plan.toml")


def test_first_shards_of_the_next_stage_are_fetched_while_this_one_is_read(folder: Path, tmp_path: Path) -> None:
    def run() -> tuple[list[list[int]], int, int]:
        loader = build_loader(cached(folder, tmp_path, (1, "web"), (6, "code"), predownload=8), job(TOTAL, TOTAL))
        batches = iter(loader)
        samples = [(next(batches)[0]["input"][:, 0] - FIRST_ID).tolist() for _ in range(2)]
        wait_until(lambda: bool(list((tmp_path / "code").glob("shard.*"))))
        fetched = loader.progress().fetched.shards
        samples += [(next(batches)[0]["input"][:, 0] - FIRST_ID).tolist() for _ in range(8)]
        return samples, fetched, loader.progress().stage

    [(samples, fetched, stage)] = run_rank_values(run)
    assert [{sample in CODE for sample in step} for step in samples] == [{False}] * 5 + [{True}] * 5
    assert fetched > len(list((tmp_path / "web").glob("shard.*"))), "those of both stages are counted"
    assert stage == 2


@pytest.mark.parametrize("workers", [(2, 2), (0, 2)])
def test_stages_from_a_store_are_read_whoever_has_fetched_before(
    folder: Path, tmp_path: Path, workers: tuple[int, int]
) -> None:
    """The ranks are forked for the workers of a second stage when the shards of a first one have been fetched."""
    with running_store() as store:
        remotes = [store.upload(folder / name, name) for name in ("web", "code")]

        def run() -> list[list[int]]:
            os.environ |= store.environment()
            stages = []
            for first, remote, num_workers in zip((1, 6), remotes, workers, strict=True):
                streams = {"it": {"remote": remote, "local": str(tmp_path / Path(remote).name)}}
                config = mixture(streams, num_workers, batching_method="blend", shuffle_block_size=20, predownload=8)
                stages.append(Stage(first, LoaderFile(config, f"{first}.toml")))
            loader = build_loader(Plan(tuple(stages), (), "plan.toml"), job(TOTAL // 2, TOTAL))
            found = [(one[0]["input"][:, 0] - FIRST_ID).tolist() for one in itertools.islice(loader, 10)]
            loader.close()
            return found

        ranks = run_ranks(run, 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output
    assert [{sample in CODE for sample in step} for step in ranks[0].value] == [{False}] * 5 + [{True}] * 5
    assert not any(rank.left for rank in ranks)


def test_cache_limit_is_kept_over_stages_that_share_a_cache(folder: Path, tmp_path: Path) -> None:
    """Each stage's dataset knows only of what it has fetched itself."""
    sizes = [file.stat().st_size for file in (folder / "web").iterdir()]
    limit = (folder / "web/index.json").stat().st_size + 3 * max(size for size in sizes) + 10

    def run() -> list[tuple[int, int]]:
        plan = cached(folder, tmp_path, (1, "web"), (4, "web"), (7, "web"), cache_limit=limit, predownload=1)
        loader, found = build_loader(plan, job(1, 1)), []
        batches = iter(loader)
        for _ in range(12):
            next(batches)
            in_cache = sum(file.stat().st_size for file in (tmp_path / "web").glob("[si]*"))
            found.append((in_cache, loader._dataset.cache_usage))
        return found

    [found] = run_rank_values(run)
    assert all(in_cache == usage <= limit for in_cache, usage in found), (limit, found)
