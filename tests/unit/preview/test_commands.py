"""The commands of `preview`: what they say of a step against what training runs have read, and how they fail."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader

from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.preview.__main__ import main
from examples.mosaic_streaming.preview.first_look import print_first_look
from examples.mosaic_streaming.preview.open_data import PREFIX, private_folder
from examples.mosaic_streaming.train import main as train_main
from tests.support.jobs import LAYOUTS, command, train, write_files
from tests.support.looking import by_dp_rank, looked_up, preview, printed, recorded_by_dp_rank
from tests.support.ranks import run_ranks, wait_until
from tests.support.recording import recording
from tests.support.store import running_store
from tests.support.streams import sample_tokens, write_stream

STEPS = 20
"""Of 4 samples; an epoch of 100 has 16 steps: 64 ranges take turns once."""
CHECKPOINTS = ("--checkpoint.enable", "--checkpoint.interval=6")


def run(files: Path, name: str, *flags: str, world_size: int = 1, first_step: int = 1) -> dict[tuple[int, int], Any]:
    """Train up to step 20; what was read, by step and dp rank."""
    with recording(files / name):
        train(files, f"--training.steps={STEPS}", *flags, world_size=world_size)
    return recorded_by_dp_rank(files / name, first_step)


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout == "gradient accumulation" else pytest.param(layout, marks=pytest.mark.long)
        for layout in LAYOUTS
    ],
)
def test_step_says_what_training_reads_in_each_layout_also_after_an_epochs_end(files: Path, layout: str) -> None:
    world_size, flags = LAYOUTS[layout]
    found = run(files, "run", *flags, world_size=world_size)
    assert len({step for step, _ in found}) == STEPS
    assert looked_up(files, f"1:{STEPS}", world_size=world_size, titan=flags) == found


@pytest.fixture(scope="module")
def stopped(module_path: Path) -> Path:
    """A folder with files and a run of one rank that has ended after step 12, with a checkpoint of step 6, too."""
    files = write_files(module_path)
    train(files, "--training.steps=12", *CHECKPOINTS)
    return files


@pytest.mark.long
def test_step_says_what_is_read_after_a_resume_on_other_ranks(stopped: Path) -> None:
    flags = (*CHECKPOINTS, "--training.local_batch_size=1", "--checkpoint.load_step=12")
    found = run(stopped, "resumed", *flags, world_size=2, first_step=13)
    assert sorted({step for step, _ in found}) == [*range(13, STEPS + 1)]
    assert looked_up(stopped, f"13:{STEPS}", world_size=2, titan=flags) == found
    checkpoint = f"--checkpoint={stopped}/outputs/checkpoint/step-12"
    assert looked_up(stopped, f"13:{STEPS}", checkpoint, world_size=2, titan=flags) == found


@pytest.mark.long
def test_step_says_what_is_read_after_a_resume_with_another_global_batch(stopped: Path) -> None:
    flags = (*CHECKPOINTS, "--training.global_batch_size=6", "--checkpoint.load_step=6", "--checkpoint.interval=100")
    found = run(stopped, "wider", *flags, first_step=7)
    checkpoint = f"--checkpoint={stopped}/outputs/checkpoint/step-6"
    assert looked_up(stopped, f"7:{STEPS}", checkpoint, titan=flags) == found
    around = preview(stopped, "step", "--around=8", "--no-text", checkpoint, titan=flags)
    assert around["around"] == [] and "The global batch changes in these steps" in around["around_notes"][0]


def test_ledger_and_plan_of_a_checkpoint_say_where_it_stands(stopped: Path) -> None:
    checkpoint = f"--checkpoint={stopped}/outputs/checkpoint/step-12"
    ledger = preview(stopped, "ledger", checkpoint)
    assert (ledger["step"], ledger["epoch"], ledger["sample_in_epoch"]) == (12, 0, 48)
    assert ledger["streams"][0]["tokens"] == 48 * 16
    resume = preview(stopped, "plan", checkpoint, titan=("--training.steps=50",))["resume"]
    assert (resume["step"], resume["steps_left"], resume["steps_left_in_epoch"]) == (12, 38, 4)
    assert resume["order_survives"] and resume["same_batches"] and resume["differences"] == []
    wider = preview(stopped, "plan", checkpoint, titan=("--training.global_batch_size=6",))["resume"]
    assert wider["order_survives"] and not wider["same_batches"]
    assert wider["global_batch_size"] == {"checkpoint": 4, "now": 6}


def test_plan_of_a_checkpoint_of_other_data_says_what_a_start_would(stopped: Path) -> None:
    loader = stopped / "loader.toml"
    before = loader.read_text()
    loader.write_text(before + "shuffle_seed = 5\n")
    try:
        checkpoint = f"--checkpoint={stopped}/outputs/checkpoint/step-12"
        said = printed(stopped, "plan", checkpoint, titan=CHECKPOINTS, code=1)
        assert "A start would be refused, with the reason at the end." in said
        reason = said[said.index("ConfigError: ") :]
        assert re.search(r"dataset.shuffle_seed +9176 +5\n", reason)
        [started] = run_ranks(
            lambda: train_main(command(stopped, "--training.steps=20", *CHECKPOINTS, "--checkpoint.load_step=12"))
        )
        assert started.output.endswith(reason)
        for other in (["step", "13"], ["ledger"]):
            assert reason in printed(stopped, *other, checkpoint, code=1)
    finally:
        loader.write_text(before)


def test_plan_of_a_checkpoint_minds_how_the_job_loads_it(stopped: Path, request: pytest.FixtureRequest) -> None:
    """With other data, which would be refused if it were loaded."""
    checkpoint = f"--checkpoint={stopped}/outputs/checkpoint/step-12"
    other, loader = "--training.seq_len=8", stopped / "loader.toml"
    before = loader.read_text()
    loader.write_text(before + "max_seq_len = 9\n")
    request.addfinalizer(lambda: loader.write_text(before))
    said = printed(stopped, "plan", checkpoint, titan=(*CHECKPOINTS, other), code=1)
    assert "A start would be refused, with the reason at the end." in said
    said = printed(stopped, "plan", checkpoint, titan=(other,))
    assert "The order does not survive:" in said and re.search(r"\n +training.seq_len +16 +8 *\n", said)
    assert "checkpoint.enable = false: a start would not load it." in said
    anew = "--checkpoint.exclude_from_loading=dataloader"
    said = printed(stopped, "plan", checkpoint, titan=(*CHECKPOINTS, other, anew))
    assert "the streams would start from their beginning" in said


@pytest.mark.long
def test_ledger_of_a_checkpoint_counts_earlier_epochs_as_they_were_read(files: Path) -> None:
    """An epoch of 100 has 25 steps of 4 samples, or 16 of 6, which leave out 4."""
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace("num_canonical_nodes = 64", "num_canonical_nodes = 1"))
    train(files, "--training.steps=26", "--checkpoint.enable", "--checkpoint.interval=26")
    checkpoint = f"--checkpoint={files}/outputs/checkpoint/step-26"
    wider = ("--training.global_batch_size=6",)
    ledger = preview(files, "ledger", checkpoint, titan=wider)
    assert (ledger["epoch"], ledger["sample_in_epoch"]) == (1, 4)
    assert ledger["streams"][0]["samples"] == ledger["samples_by_checkpoint"] == 104
    train(files, "--training.steps=43", "--checkpoint.enable", "--checkpoint.interval=43", *wider)
    checkpoint = f"--checkpoint={files}/outputs/checkpoint/step-43"
    ledger = preview(files, "ledger", checkpoint, titan=wider)
    assert ledger["streams"][0]["samples"] == ledger["samples_by_checkpoint"] == 206
    said = printed(files, "step", "44", checkpoint)
    assert "For 1 rank (--world-size), 1 dp rank: global batches of 4 samples." in said
    assert "From step 27 on, global batches of 6 samples, from sample 4 of epoch 1." in said


@pytest.mark.long
def test_what_is_no_checkpoint_is_told(stopped: Path, tmp_path: Path) -> None:
    assert f"--checkpoint {tmp_path} is no finished checkpoint" in printed(
        stopped, "plan", f"--checkpoint={tmp_path}", code=1
    )
    train(
        stopped,
        "--training.steps=1",
        "--checkpoint.enable",
        "--checkpoint.folder=model",
        "--checkpoint.last_save_model_only",
    )
    said = printed(stopped, "plan", f"--checkpoint={stopped}/outputs/model", code=1)
    assert f"ConfigError: --checkpoint {stopped}/outputs/model/step-1: The checkpoint has no " in said


@pytest.mark.long
def test_index_alone_is_enough_for_steps_and_ledger(files: Path) -> None:
    before = preview(files, "step", "3")["samples"]
    assert {len(sample["text"]) > 0 for sample in before} == {True}
    for shard in (files / "stream").glob("*.mds"):
        shard.unlink()
    after = preview(files, "step", "3", "--no-text")["samples"]
    assert after == [{key: sample[key] for key in sample if key != "text"} for sample in before]
    assert preview(files, "ledger")["streams"][0]["samples"] == 16
    for what in ("show", "plan"):  # which look at the first samples, as a start does
        said = printed(files, what, code=1)
        assert f"{files}/stream/shard.00000.mds is missing, and the stream in {files}/loader.toml has no remote" in said


@pytest.mark.long
def test_of_a_store_only_the_index_and_the_shards_that_are_looked_at_are_fetched(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        remote = store.upload(files / "stream", "stream")
        loader = files / "loader.toml"
        loader.write_text(loader.read_text().replace(f"{files}/stream", f"{files}/cache") + f'remote = "{remote}"\n')

        def fetched() -> set[str]:
            found = {request["path"].rpartition("/")[2] for request in store.requests()}
            store.clear()
            return found

        assert preview(files, "plan")
        assert fetched() == {"index.json", "shard.00000.mds"}
        for look in (["ledger"], ["step", "2", "--no-text"]):
            report = preview(files, *look)  # the last is that of a step
            assert fetched() == {"index.json"}
        assert preview(files, "step", "2", "--find", "e")
        assert fetched() == {"index.json", *(sample["shard"] for sample in report["samples"])}
        [row] = preview(files, "show", "--sample=60")
        assert fetched() == {"index.json", "shard.00000.mds", row["samples"][0]["shard"]}
    assert not (files / "cache").exists()


def test_text_of_a_sample_is_looked_up_and_found_again(files: Path) -> None:
    lines = preview(files, "step", "1:16")["samples"]
    assert len(lines) == 64
    seven = lines[7]
    assert seven["sample"] == by_dp_rank(lines)[2, 0][3] and seven["step"] == 2
    [shard] = json.loads((files / "stream/index.json").read_text())["shards"][int(seven["shard"][6:11]) :][:1]
    assert seven["sample_of_shard"] < shard["samples"]
    [row] = preview(files, "show", f"--sample={seven['sample']}")
    assert row["samples"] == [{key: seven[key] for key in row["samples"][0]}]
    ids = [token for document in row["documents"] for span in document["spans"] for token in span["ids"]]
    assert ids == sample_tokens(seven["sample"]).tolist()
    part = seven["text"][5:25]
    found = preview(files, "step", "1:16", "--find", part)["samples"]
    assert seven in found
    assert found == [line for line in lines if part in line["text"]]
    assert preview(files, "step", "1:16", "--find", "no such text anywhere")["samples"] == []


def test_table_of_a_step_has_a_line_of_all_columns_for_each_sample(files: Path) -> None:
    samples = preview(files, "step", "2")["samples"]
    lines = [line.split() for line in printed(files, "step", "2").splitlines()]
    for sample in samples:
        place = [sample["shard"], f"[{sample['sample_of_shard']}]"]
        begin = ["2", "0", str(sample["batch"]), str(sample["sample"]), "dataset", *place]
        [line] = [line for line in lines if line[:7] == begin]
        assert "".join(line[7:])[:4] == "".join(sample["text"].split())[:4]


def test_dp_rank_alone_can_be_asked_for(files: Path) -> None:
    given = ("step", "1:2", "--no-text", "--world-size=2")
    both = preview(files, *given, titan=("--training.local_batch_size=1",))["samples"]
    one = preview(files, *given, "--dp-rank=1", titan=("--training.local_batch_size=1",))["samples"]
    assert one == [line for line in both if line["dp_rank"] == 1]
    assert {line["batch"] for line in one} == {0, 1}


@pytest.mark.parametrize(
    ("flags", "titan", "message"),
    [
        (["step", "0"], [], "argument N or N:M: 0 is less than 1. See --help."),
        (["step", "3:"], [], "argument N or N:M: invalid steps value: '3:'. See --help."),
        (["step", "5:4"], [], "argument N or N:M: '5:4' has no steps. See --help."),
        (["step", "1", "--dp-rank=1"], [], "--dp-rank 1, but on these ranks there are 0 to 0."),
        (["show", "--stream=web"], [], "--stream web, but {files}/loader.toml has: dataset."),
        (["show", "--stream=dataset", "--sample=1"], [], "argument --sample: not allowed with argument --stream."),
        (["ledger", "--plot=x.png"], ["--training.steps=0"], "training.steps = 0 in the job config, expected a whole"),
        (["show", "--sample=100"], [], "Sample 100: the streams have samples 0 to 99."),
        (["show", "--plot=/nowhere/lengths.png"], [], "--plot /nowhere/lengths.png can't be written: "),
        (["ledger", "--step=3", "--checkpoint=x"], [], "--checkpoint x is no finished checkpoint, and has none in it."),
        (["show", "--validation"], [], "--validation, but the job reads no validation streams: name their file with"),
        (["plan", "--world-size=3"], ["--parallelism.tensor_parallel_degree=2"], "on 3 ranks: Invalid parallel"),
        (["plan", "--world-size=3"], [], "training.global_batch_size = 4 is not a multiple of"),
        (["plan"], ["--training.stepz=3"], "TorchTitan refuses a flag or a value"),
        (["plan"], ["--model.flavor=9B"], "model.flavor = '9B', but llama3_mosaic has: debugmodel"),
        (["plan", "--training.steps=3"], [], "--training.steps=3: not a flag of ours. TorchTitan's flags go behind"),
        (["plan"], ["--validation.enable"], "validation.enable = true, but no validation streams are given"),
        (
            ["plan", "--mosaic-validation-config={files}/loader.toml"],
            ["--validation.enable", "--validation.seq_len=17"],
            "validation.seq_len = 17, but the model is made for training.seq_len = 16.",
        ),
        (["plann"], [], "invalid choice: 'plann' (choose from "),
    ],
)
def test_error_of_the_user_is_one_line(files: Path, flags: list[str], titan: list[str], message: str) -> None:
    said = printed(files, *(flag.format(files=files) for flag in flags), titan=tuple(titan), code=1)
    [line] = [line for line in said.splitlines() if line.startswith("ConfigError: ")]
    assert message.format(files=files) in line


@pytest.mark.long
def test_data_and_caches_are_left_as_they_are_and_nothing_else_is_left(files: Path) -> None:
    """Also of a compressed stream, which a job would unpack into its cache."""
    shutil.rmtree(files / "stream")
    with MDSWriter(out=str(files / "stream"), columns={"tokens": "ndarray:int32"}, compression="zstd") as writer:
        for sample in range(100):
            writer.write({"tokens": sample_tokens(sample)})
    (files / "cache").mkdir()
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace("/stream", "/cache") + f'remote = "{files}/stream"\n')
    before = contents(files)
    shared = set(os.listdir("/dev/shm"))

    def look(*flags: str) -> list[str]:
        main([*flags, *command(files)])
        return [name for name in os.listdir(tempfile.gettempdir()) if "preview" in name]

    for flags in (["show"], ["step", "1"], ["plan"], ["ledger"]):
        [rank] = run_ranks(functools.partial(look, *flags))
        assert (rank.code, rank.value, rank.left) == (0, [], []), rank.output
    assert set(os.listdir("/dev/shm")) == shared
    assert contents(files) == before


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of all files and folders."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_closed_terminal_leaves_nothing(files: Path) -> None:
    shared = set(os.listdir("/dev/shm"))

    def end(pids: list[int], outputs: list[Path]) -> None:
        folder = outputs[0].parent
        wait_until(lambda: bool(list(folder.glob("mosaic_streaming-preview-*/in_use"))), outputs[0].read_text)
        time.sleep(0.5)
        os.kill(pids[0], signal.SIGHUP)
        left.append(folder)

    left: list[Path] = []
    given = ["step", "1:100000", "--find", "no such text", *command(files)]
    [rank] = run_ranks(lambda: main(given), while_running=end, timeout=30)
    assert rank.code == 128 + signal.SIGHUP
    assert set(os.listdir("/dev/shm")) == shared


def test_folder_of_a_killed_preview_is_removed_by_the_next(files: Path) -> None:
    def look() -> list[str]:
        with private_folder(AbortChannel()) as mine:
            process = os.fork()
            if process == 0:
                with private_folder(AbortChannel()):
                    os._exit(0)  # as if it were killed
            os.waitpid(process, 0)
            names = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX)]
            assert len(names) == 2, "a living one, and what a dead one has left"
            with private_folder(AbortChannel()) as other:
                now = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX)}
                assert now == {os.path.basename(mine), os.path.basename(other)}
        return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX)]

    [rank] = run_ranks(look)
    assert rank.value == [], rank.output


def test_what_others_have_put_into_the_temporary_folder_is_neither_opened_nor_removed(tmp_path: Path) -> None:
    """A pipe that nobody writes to, in place of a lock: to open it would take for ever."""

    def look() -> list[str]:
        folder = Path(tempfile.gettempdir())
        (folder / f"{PREFIX}pipe").mkdir()
        os.mkfifo(folder / f"{PREFIX}pipe/in_use")
        (tmp_path / "in_use").touch()
        (folder / f"{PREFIX}link").symlink_to(tmp_path)
        (folder / f"{PREFIX}lock").mkdir()
        (folder / f"{PREFIX}lock/in_use").symlink_to(tmp_path / "in_use")
        (folder / f"{PREFIX}file").touch()
        if os.getuid() == 0:
            (folder / f"{PREFIX}other").mkdir()
            (folder / f"{PREFIX}other/in_use").touch()
            os.chown(folder / f"{PREFIX}other", 12345, 12345)
        before = sorted(os.listdir(folder))
        with private_folder(AbortChannel()):
            pass
        assert sorted(os.listdir(folder)) == before
        return os.listdir(tmp_path)

    [rank] = run_ranks(look, timeout=30)
    assert rank.value == ["in_use"], rank.output


def test_no_temporary_folder_is_told(files: Path) -> None:
    def run() -> None:
        tempfile.tempdir = "/nowhere"
        main(["plan", *command(files)])

    [rank] = run_ranks(run)
    assert rank.code == 1
    assert rank.output.splitlines()[-1].startswith("ConfigError: No temporary folder can be made")


def test_sample_lies_where_it_is_said_to(files: Path) -> None:
    """Two streams, whose shards have the same names, read here by streaming itself."""
    write_stream(files / "b", 50, first=100)
    folders = {"a": files / "stream", "b": files / "b"}
    (files / "loader.toml").write_text(
        'name = "text"\n[dataset]\nshuffle = true\n'
        + "".join(f'[dataset.streams.{name}]\nlocal = "{folder}"\n' for name, folder in folders.items())
    )
    samples = preview(files, "step", "1:20", "--no-text")["samples"]
    assert {sample["stream"] for sample in samples} == {"a", "b"}
    assert len({sample["shard"] for sample in samples}) > 5
    for sample in samples:
        index = json.loads((folders[sample["stream"]] / "index.json").read_text())
        [entry] = [one for one in index["shards"] if one["raw_data"]["basename"] == sample["shard"]]
        reader = MDSReader.from_json(str(folders[sample["stream"]]), None, entry)
        tokens = reader[sample["sample_of_shard"]]["tokens"]
        assert tokens.tolist() == sample_tokens(sample["sample"]).tolist()
        assert sample["sample_of_stream"] == sample["sample"] - (100 if sample["stream"] == "b" else 0)


def test_damaged_checkpoint_is_told_in_a_line(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "outputs/checkpoint/step-12", tmp_path / "step-12")
    for file in (tmp_path / "step-12").glob("*.distcp"):
        file.unlink()
    said = printed(stopped, "plan", f"--checkpoint={tmp_path}", code=1)
    assert f"ConfigError: --checkpoint {tmp_path}/step-12: it can't be read: FileNotFoundError: " in said
    (tmp_path / "step-12/.metadata").write_bytes(b"")
    (tmp_path / "step-12/__0.metadata").write_bytes(b"")  # torch tries it where the other can't be read
    said = printed(stopped, "plan", f"--checkpoint={tmp_path}", code=1)
    assert f"ConfigError: --checkpoint {tmp_path}/step-12: it can't be read: AssertionError: metadata is None" in said


def test_control_characters_of_a_text_are_shown_not_obeyed(files: Path) -> None:
    shutil.rmtree(files / "stream")
    with MDSWriter(out=str(files / "stream"), columns={"text": "str"}) as writer:
        for _ in range(100):
            writer.write({"text": "a\x1b[31mb\x07\r\x9bc"})
    for look in (["show"], ["step", "1"]):
        said = printed(files, *look)
        assert r"\x1b[31mb\x07\x0d\x9bc" in said
        assert not {"\x1b", "\x07", "\r", "\x9b"} & set(said)


@pytest.mark.long
def test_sample_that_makes_no_row_is_named_and_the_others_are_shown(files: Path) -> None:
    """llm-foundry refuses a prompt that fills its row, wherever training meets it."""
    with MDSWriter(out=str(files / "turns"), columns=dict.fromkeys(("input_ids", "labels"), "ndarray:int32")) as writer:
        for sample in range(100):
            tokens = sample_tokens(sample)
            writer.write({"input_ids": tokens if sample == 1 else tokens[:4], "labels": tokens[4:]})
    (files / "loader.toml").write_text(
        f'name = "finetuning"\n[dataset]\nremote = "{files}/turns"\nlocal = "{files}/turns"\nnum_canonical_nodes = 1\n'
    )
    good, bad, other = preview(files, "show", "--rows=3")
    reason = "Sample 1 makes no row, and training would stop there: Truncating to max_seq_len=17 has removed all"
    assert bad["error"].startswith(reason) and bad["samples"][0]["sample"] == 1
    assert good["target"] == other["target"] > 0
    assert reason in printed(files, "show")
    first = preview(files, "step", "1")["samples"]
    assert [sample["sample"] for sample in first if "text" not in sample] == [1]
    assert len(preview(files, "step", "1", "--find", "")["samples"]) == 4
    train_error = run_ranks(lambda: train_main(command(files)))[0].output
    assert "Truncating to max_seq_len=17 has removed all" in train_error


def test_chat_that_llm_foundry_refuses_is_named_and_the_others_are_shown(files: Path) -> None:
    """What it refuses in reading; a file that is damaged ends the command all the same."""
    turns = [[{"role": role, "content": f"{role} {sample}"} for role in ROLES] for sample in range(100)]
    turns[1].pop()  # it ends with the user's
    with MDSWriter(out=str(files / "chats"), columns={"messages": "json"}) as writer:
        for messages in turns:
            writer.write({"messages": messages})
    (files / "loader.toml").write_text(
        f'name = "finetuning"\n[dataset]\nremote = "{files}/chats"\nlocal = "{files}/chats"\nnum_canonical_nodes = 1\n'
    )
    titan = ("--training.seq_len=64",)
    good, bad, other = preview(files, "show", "--rows=3", titan=titan)
    assert bad["error"].startswith("Sample 1 makes no row, and training would stop there: Sample 1 in shard.00000.mds")
    assert good["target"] and other["target"]
    assert bad["error"] in " ".join(printed(files, "show", titan=titan).split())
    first = preview(files, "step", "1", titan=titan)["samples"]
    assert [sample["sample"] for sample in first if "text" not in sample] == [1]
    assert bad["error"].partition("stop there: ")[2] in run_ranks(lambda: train_main(command(files, *titan)))[0].output
    shard = files / "chats/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[: -shard.stat().st_size // 2])
    assert "DataError: " in printed(files, "show", "--sample=99", titan=titan, code=1)


ROLES = ("user", "assistant")


def test_sample_that_is_no_row_for_the_model_is_named_and_the_others_are_shown(files: Path) -> None:
    with MDSWriter(out=str(files / "ids"), columns={"tokens": "ndarray:int32"}) as writer:
        for sample in range(100):
            writer.write({"tokens": sample_tokens(sample) + 2048 * (sample == 1)})
    (files / "loader.toml").write_text(f'name = "text"\n[dataset]\nlocal = "{files}/ids"\n')
    good, bad, other = preview(files, "show", "--rows=3")
    assert bad["error"].startswith("Sample 1 makes no row for the model, and training would stop there: Token id ")
    assert good["target"] and other["target"]


@pytest.fixture
def validating(files: Path) -> tuple[str, ...]:
    """The flag that names validation streams of 25 and 5 samples, of a folder with files."""
    for name, samples, first in (("a", 25, 200), ("b", 5, 225)):
        write_stream(files / name, samples, first=first)
    (files / "validation.toml").write_text(
        'name = "text"\n[dataset]\n'
        + "".join(f'[dataset.streams.{name}]\nlocal = "{files}/{name}"\n' for name in ("a", "b"))
    )
    return (f"--mosaic-validation-config={files}/validation.toml",)


VALIDATION = ("--validation.enable", "--validation.seq_len=16", "--validation.local_batch_size=4")


@pytest.mark.parametrize(
    ("steps", "batches", "samples"), [pytest.param("-1", 4, 30, marks=pytest.mark.long), ("3", 3, 24)]
)
def test_plan_has_the_validation_streams_and_what_a_round_reads(
    files: Path, validating: tuple[str, ...], steps: str, batches: int, samples: int
) -> None:
    """As the log of a run says it."""
    titan = (*VALIDATION, f"--validation.steps={steps}", "--training.steps=1", "--training.local_batch_size=1")
    plan = preview(files, "plan", *validating, "--world-size=2", titan=titan)["validation"]
    assert [(stream["name"], stream["samples"], stream["source"]) for stream in plan["streams"]] == [
        ("a", 25, f"{files}/a"),
        ("b", 5, f"{files}/b"),
    ]
    assert plan["round"] == {"batches": batches, "samples": samples, "global_batch_size": 8}
    said = printed(files, "plan", *validating, "--world-size=2", titan=titan)
    assert (
        f"A round, after step 1 and each 10 steps: {samples} of 30 samples, in {batches} batches of 8 rows of" in said
    )
    log = run_ranks(lambda: train_main([*validating, *command(files, *titan)]), 2)[0].output
    assert f"A validation round reads {samples} of 30 samples, in {batches} batches of 8." in log


def test_show_has_rows_of_validation_streams(files: Path, validating: tuple[str, ...]) -> None:
    rows = preview(files, "show", "--validation", "--rows=1", *validating, titan=VALIDATION)
    assert [row["samples"][0]["stream"] for row in rows] == ["a", "b"]
    ids = [[token for span in row["documents"][0]["spans"] for token in span["ids"]] for row in rows]
    assert ids == [sample_tokens(sample).tolist() for sample in (200, 225)]


def test_validation_streams_that_a_job_does_not_read_are_none(files: Path, validating: tuple[str, ...]) -> None:
    assert preview(files, "plan", *validating)["validation"] is None
    same = ("--mosaic-validation-config", f"{files}/loader.toml")
    warnings = preview(files, "plan", *same, titan=VALIDATION)["warnings"]
    assert f"Training reads the same as validation: {files}/stream. The loss will tell less." in warnings


@pytest.mark.long
def test_documented_command_prints_plainly_into_a_pipe_that_closes_early(files: Path) -> None:
    given = [sys.executable, "-m", "examples.mosaic_streaming.preview", "show", "--rows", "50", *command(files)]
    line = " ".join(f"'{part}'" for part in given) + " | head -3"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240)
    opening, first, *_ = done.stdout.splitlines()
    assert opening.startswith(f"Opening dataset in {files}/loader.toml: {files}/stream (samples: 100, shards: ")
    assert first == "Sample 0 (dataset, shard.00000.mds [0])"
    assert len(done.stdout.splitlines()) == 3
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr


FIRST_LOOK = """
import sys
from examples.mosaic_streaming.preview.__main__ import build_parser, print_first_look
print_first_look(build_parser().parse(sys.argv[1:])[0])
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("index", "flags", "said"),
    [
        ('{"shards": [{"samples": 1000}, {"samples": 2}]}', [], "{loader}: {stream} (samples: 1,002, shards: 2)"),
        ('{"shards": [{"samples": 1}]}', ["--json"], None),
        ("damaged", [], None),
        (None, [], None),
    ],
)
def test_first_line_says_what_is_opened_before_slow_imports(
    tmp_path: Path, index: str | None, flags: list[str], said: str | None
) -> None:
    """What can't be read is told later, by what reads it."""
    (loader, stream) = (tmp_path / "loader.toml", tmp_path / "stream")
    loader.write_text(f'name = "text"\n[dataset]\nlocal = "{stream}"\n')
    stream.mkdir()
    if index is not None:
        (stream / "index.json").write_text(index)
    given = [sys.executable, "-c", FIRST_LOOK, "plan", "--config=none.toml", f"--mosaic-config={loader}", *flags]
    done = subprocess.run(given, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": "."})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (f"Opening dataset in {said.format(loader=loader, stream=stream)}\n" if said else "")


def test_first_look_at_a_plan_has_each_stage_and_remote_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text('[[stage]]\nloader = "a.toml"\n[[stage]]\nloader = "b.toml"\nfrom_step = 9\n')
    for name in ("a", "b"):
        streams = f'[dataset]\nbatching_method = "blend"\n[dataset.streams.{name}]\nremote = "s3://{name}/x"\n'
        (tmp_path / f"{name}.toml").write_text(f'name = "text"\n{streams}')
    print_first_look(Namespace(mosaic_config=f"{tmp_path}/plan.toml", json=False))
    assert capsys.readouterr().out.splitlines() == [
        f"Opening {name} in {tmp_path}/{name}.toml: s3://{name}/x" for name in ("a", "b")
    ]
