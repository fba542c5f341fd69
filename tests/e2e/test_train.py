"""Whole runs of `train.main` with TorchTitan's debug model: training, checkpoints, errors, and how a run ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torchtitan.train import Trainer

from examples.mosaic_streaming.make_demo_data import make_demo_data
from examples.mosaic_streaming.titan import steps_with
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses, tell_when_closed, train, write_loader
from tests.support.ranks import nothing_is_left, run_rank_values, run_ranks, wait_until
from tests.support.streams import SEQ_LEN, write_tokens


def test_model_trains_on_the_cpu(files: Path) -> None:
    [rank] = train(files)
    assert list(losses(rank.output)) == [1, 2, 3, 4]
    assert rank.output.count("No accelerator: TorchTitan runs on the CPU") == 1
    [memory] = set(re.findall(r"step: +4 .*memory: +([\d.]+)GiB", rank.output))
    assert float(memory) > 0.1, "the process's: torch alone takes more"


def test_seed_checkpoint_is_step_0_and_nothing_is_trained(files: Path) -> None:
    [rank] = train(files, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    assert "Created seed checkpoint" in rank.output
    assert not losses(rank.output)
    assert os.listdir(files / "outputs/checkpoint") == ["step-0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.stepz=3"], "TorchTitan refuses a flag or a value"),
        (["--model.name=llama3"], "model.name = 'llama3' does not read Mosaic streams. Set it to 'llama3_mosaic'."),
        (["--training.seq_len=32"], "have 17 tokens, but rows of training.seq_len = 32 take 33"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (["--model.flavor=9B"], "model.flavor = '9B', but llama3_mosaic has: debugmodel"),
                (["--model.hf_assets_path=/nowhere"], "model.hf_assets_path = '/nowhere' has no tokenizer_config.json"),
                (["--validation.enable"], "validation.enable = true, but no validation streams are given"),
                (["--comm.mode=fake_backend"], "comm.mode = 'fake_backend' has no real ranks"),
                (["--training.global_batch_size=3"], "training.global_batch_size = 3 is not a multiple of"),
                (["--training.seq_len=17"], "training.seq_len = 17, but TorchTitan's models take multiples of 2: "),
                (["--checkpoint.create_seed_checkpoint", "--checkpoint.enable"], "create_seed_checkpoint on 2 ranks"),
                (
                    ["--checkpoint.enable", "--checkpoint.last_save_in_hf"],
                    "checkpoint.last_save_in_hf = true, but checkpoint.",
                ),
            )
        ),
    ],
)
def test_error_of_the_user_ends_all_ranks_with_one_line_on_rank_0(files: Path, flags: list[str], message: str) -> None:
    first, second = run_ranks(lambda: main(command(files, *flags)), 2)
    assert first.code == 1
    assert second.code != 0
    assert (first.output + second.output).count(message) == 1
    assert first.output.splitlines()[-1].startswith(("ConfigError: ", "DataError: "))
    assert "Traceback" not in first.output + second.output


def test_torchruns_report_has_the_reason_once_and_no_traceback(files: Path) -> None:
    def run() -> None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(files / f"{os.environ['RANK']}.json")
        main(command(files, "--training.global_batch_size=3"))

    run_ranks(run, 2)
    first, second = ((files / f"{rank}.json").read_text() for rank in range(2))
    assert "training.global_batch_size = 3 is not a multiple of" in first
    assert "Ended with rank 0." in second
    assert "Traceback" not in first + second


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/stream", "/streem", "No index.json in {files}/streem (dataset in {files}/loader.toml)"),
        ("[dataset]", "[dataset", "{files}/loader.toml is not valid TOML: "),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ('name = "text"', 'name = "txt"', "name = 'txt' in {files}/loader.toml, expected one of: "),
                ("num_workers = 0", "num_worker = 0", "num_worker (did you mean num_workers?)"),
                ("shuffle = true", "shufle = true", "dataset.shufle (did you mean shuffle?)"),
                ("shuffle = true", "replication = 2", "dataset.replication = 2 in {files}/loader.toml, but world size"),
            )
        ),
    ],
)
def test_error_in_the_loader_config_ends_all_ranks_with_one_line(files: Path, old: str, new: str, message: str) -> None:
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace(old, new))
    first, second = run_ranks(lambda: main(command(files)), 2)
    assert first.code == 1
    assert second.code != 0
    assert (first.output + second.output).count(message.format(files=files)) == 1
    assert first.output.splitlines()[-1].startswith("ConfigError: ")
    assert "Traceback" not in first.output + second.output


def test_seed_checkpoint_needs_checkpoints(files: Path) -> None:
    [rank] = run_ranks(lambda: main(command(files, "--checkpoint.create_seed_checkpoint")))
    assert rank.code == 1
    assert "create_seed_checkpoint needs checkpoint.enable = true" in rank.output


def test_unknown_key_in_the_job_config_is_told(files: Path) -> None:
    (files / "job.toml").write_text((files / "job.toml").read_text().replace("steps = 4", "stepz = 4"))
    [rank] = run_ranks(lambda: main(command(files)))
    assert rank.code == 1
    told = f"ConfigError: training.stepz in {files}/job.toml: unknown. Keys like it: training.steps"
    assert rank.output.splitlines()[-1].startswith(told)


def test_without_torchrun_the_way_to_start_is_told(files: Path) -> None:
    def run() -> None:
        del os.environ["LOCAL_RANK"]
        main(command(files))

    [rank] = run_ranks(run)
    assert rank.code == 1
    assert rank.output == "ConfigError: Not started by torchrun. See --help.\n"


def test_torchtitans_flags_are_listed(files: Path) -> None:
    [rank] = run_ranks(lambda: main(["--", "--help"]))
    assert rank.code == 0
    assert "--training.local-batch-size" in rank.output


@pytest.mark.parametrize(
    ("token", "notice", "codes"),
    [
        (22, 0, {1, 128 + signal.SIGTERM}),
        *(pytest.param(token, 20, {1}, marks=pytest.mark.long) for token in (22, 4001)),
    ],
)
def test_error_of_another_rank_alone_is_told_by_rank_0(files: Path, token: int, notice: float, codes: set[int]) -> None:
    """The second rank meets a token that no model has; the first is caught in a collective, or meets another later.

    In the collective it meets torchrun's SIGTERM, or the end of the second rank. torch leaves a report of each
    exception, on the first rank always after the reason has been told.
    """
    rows = [[each] * (SEQ_LEN + 1) for each in (20, 21, token, 4000)]
    write_loader(files, write_tokens(files / "bad", rows))
    text = (
        (files / "loader.toml")
        .read_text()
        .replace("shuffle = true\nnum_canonical_nodes = 64", "num_canonical_nodes = 1")
    )
    (files / "loader.toml").write_text(text)

    record = ErrorHandler.record_exception

    def record_late(handler: ErrorHandler, error: BaseException) -> None:
        time.sleep(1 if os.environ["RANK"] == "1" else 3)
        record(handler, error)

    def run() -> None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(files / f"{os.environ['RANK']}.json")
        with mock.patch.object(ErrorHandler, "record_exception", record_late):
            main(command(files, "--training.local_batch_size=2"))

    first, second = run_ranks(run, 2, notice=notice)
    assert first.code in codes and second.code == 1
    assert first.output.count("DataError: Token id 4000 in a batch") == 1
    assert "Stopped by SIGTERM" not in first.output, "it follows from the error"
    assert "DataError: Token id 4000 in a batch" in (files / "0.json").read_text(), "torchrun's report has it, too"
    assert "DataError" not in second.output and "Traceback" not in first.output + second.output


def test_nothing_is_left_after_success(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_when_closed(monkeypatch)
    write_loader(files, files / "stream", num_workers=2)

    def run() -> bool:
        main(command(files))
        return dist.is_initialized()

    ranks = run_ranks(run, 2)
    assert [rank.value for rank in ranks] == [False, False], "the process group is destroyed"
    assert all("closed, 0 workers" in rank.output for rank in ranks)
    nothing_is_left(ranks)


def test_nothing_is_left_after_an_exception_which_is_the_one_shown(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_loader(files, files / "stream", num_workers=2)
    tell_when_closed(monkeypatch)
    step, close = Trainer.train_step, Trainer.close

    def fail_at_step_2(self: Trainer, batches: object) -> None:
        if self.step == 2:
            raise ArithmeticError("the original exception")
        step(self, batches)

    def close_and_fail(self: Trainer) -> None:
        close(self)
        raise RuntimeError("another exception")

    monkeypatch.setattr(Trainer, "train_step", fail_at_step_2)
    monkeypatch.setattr(Trainer, "close", close_and_fail)
    [rank] = run_ranks(lambda: main(command(files)))
    assert rank.code == 1
    assert list(losses(rank.output)) == [1]
    assert "closed, 0 workers" in rank.output
    assert rank.output.splitlines()[-1] == "ArithmeticError: the original exception"
    nothing_is_left([rank])


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_nothing_is_left_after_a_signal(files: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_when_closed(monkeypatch)
    write_loader(files, files / "stream", num_workers=2)
    ranks = run_ranks(
        lambda: main(command(files, "--training.steps=1000000")), 2, while_running=signal_at_step_3(number)
    )
    assert [rank.code for rank in ranks] == [128 + number] * 2
    assert all("closed, 0 workers" in rank.output for rank in ranks)
    nothing_is_left(ranks)


def signal_at_step_3(number: signal.Signals) -> Callable[[list[int], list[Path]], None]:
    """Send a signal to the ranks' process groups, as torchrun does, when training is well under way."""

    def send(pids: list[int], outputs: list[Path]) -> None:
        wait_until(
            lambda: all(output.exists() and "step:  3" in output.read_text() for output in outputs),
            outputs[0].read_text,
        )
        for pid in pids:
            os.killpg(pid, number)

    return send


@pytest.mark.long
def test_the_documented_command_trains_on_the_demo_data(tmp_path: Path) -> None:
    """The second command of the README, through torchrun; only its outputs are put elsewhere."""
    run_rank_values(make_demo_data)
    _, documented = re.findall(r"```bash\n(torchrun .*?)\n```", Path("README.md").read_text(), re.DOTALL)
    ended = subprocess.run(
        f"{documented} --job.dump_folder={tmp_path} --metrics.disable_color_printing=true",
        shell=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    logged = losses(ended.stdout)
    assert list(logged) == list(range(1, 21))
    assert 7.9 < logged[1] < 8.3
    assert logged[20] < 7.0
    assert list(tmp_path.glob("tb/*/events.out.tfevents.*"))


@pytest.mark.long
def test_folder_without_a_finished_checkpoint_doesnt_hide_the_given_weights(files: Path) -> None:
    flags = ("--checkpoint.enable", f"--checkpoint.initial_load_path={files}/outputs/seed/step-0")
    train(files, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=seed")
    (files / "outputs/checkpoint/step-10").mkdir(parents=True)
    [rank] = run_ranks(lambda: main(command(files, *flags)))
    assert rank.code == 1
    assert f"ConfigError: {files}/outputs/checkpoint has no finished checkpoint" in rank.output
    train(files, *flags, "--checkpoint.folder=fresh")
    [rank] = run_ranks(lambda: main(command(files, flags[0], "--checkpoint.load_step=10")))
    assert rank.code == 1
    assert f"checkpoint.load_step = 10, but {files}/outputs/checkpoint has finished steps: none." in rank.output
    [rank] = run_ranks(lambda: main(command(files, *flags[1:])))
    assert rank.code == 1
    assert "ConfigError: checkpoint.enable = false, so TorchTitan would begin with random weights" in rank.output


@pytest.mark.parametrize("name", ["checkpoint[1]", "checkpoint"])
def test_finished_steps_are_found_whatever_folders_are_called(tmp_path: Path, name: str) -> None:
    for step in ("step-10", "step-20.old", "step-30-hf", "best"):
        (tmp_path / name / step).mkdir(parents=True)
        (tmp_path / name / step / ".metadata").touch()
    (tmp_path / name / "step-40").mkdir()
    assert steps_with(str(tmp_path / name), ".metadata") == {10, 20, 30}
