"""The recipes under `configs/`, as TorchTitan and our own checks read them: none can go stale."""

import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

from examples.mosaic_streaming.config import read_loaders, resolve_stages
from examples.mosaic_streaming.config.files import read_loader
from examples.mosaic_streaming.config.loader import resolve
from examples.mosaic_streaming.config.plan import check_tables
from examples.mosaic_streaming.titan import make_job
from examples.mosaic_streaming.upstream.torchelastic import SAVING, SIGNALS
from examples.mosaic_streaming.validator import resolve_validation
from tests.support.titan import ASSETS, IS_0_2, load_config, loaded

JOBS = sorted(Path("configs").glob("*/job*.toml"))
PLANS = sorted(Path("configs").glob("*/plan.toml"))
SCRIPTS = sorted(Path("configs/launch").glob("*.sh"))
UNITS = {"million": 1e6, "billion": 1e9, "trillion": 1e12}


def test_there_is_a_recipe_for_each_purpose() -> None:
    assert {job.parent.name for job in JOBS} == {"llama3_8b", "llama3_70b", "llama3_8b_instruct", "qwen3_continued"}
    assert {f"configs/llama3_8b/job_{gpus}_gpus.toml" for gpus in (8, 64)} <= set(map(str, JOBS))
    assert [script.name for script in SCRIPTS] == ["multinode.sh", "slurm.sh"]


def world_size(job: Path) -> int:
    """The GPUs of the command that a recipe opens with."""
    text = job.read_text()
    nodes, ranks = re.search(r"NNODES=(\d+)", text), re.search(r"--nproc_per_node=(\d+)", text)
    assert nodes or ranks
    return int(nodes[1]) * 8 if nodes else int(ranks[1]) if ranks else 0


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_recipe_is_one_that_trains(job: Path) -> None:
    config, ranks = load_config(job, ASSETS), world_size(job)
    train, validation = job.parent / "train.toml", job.parent / "validation.toml"
    made = make_job(loaded(config, read_loader(str(train), "")), ranks, min(ranks, 8))
    assert int(np.prod(list(made.layout.degrees.values()))) == ranks
    tokens, pp = made.global_batch_size * made.training.seq_len, made.layout.degrees["pp"]
    assert config.training.max_norm == (tokens if pp > 1 else 1.0), "see Limits in README.md"
    loader = resolve(read_loader(str(train), ""), made.training, made.layout.replication)
    assert 64 % (ranks // 8) == 0 and loader.dataset["num_canonical_nodes"] == 64, (
        "each machine keeps to its own shards"
    )
    for stream in loader.streams.values():
        assert stream["download_retry"] * stream["download_timeout"] < made.collective_timeout
        assert stream["remote"].startswith("s3://") and stream["local"]
    assert "packing_ratio" not in loader.dataset or made.documents or not IS_0_2  # 0.3: always, on a GPU
    if made.validation:
        held_out = resolve_validation(read_loader(str(validation), ""), made, [loader])
        caches = {stream["local"] for stream in loader.streams.values()}
        assert not caches & {stream["local"] for stream in held_out.streams.values()}


@pytest.mark.parametrize("path", PLANS, ids=str)
def test_plan_is_one_that_its_job_reads(path: Path) -> None:
    job = path.parent / "job_64_gpus.toml"
    plan, _ = read_loaders(str(path), None)
    made = make_job(loaded(load_config(job, ASSETS), plan), world_size(job), 8)
    train, anneal = resolve_stages(plan, made)
    assert train.source == str(path.parent / "train.toml")
    last = plan.stages[-1].from_step
    assert made.steps - last + 1 == round(made.steps / 10), "the last tenth of the steps"
    for stage in (train, anneal):
        assert sum(stream["proportion"] for stream in stage.streams.values()) == pytest.approx(1)
    again = ("remote", "local")
    assert {name: [stream[key] for key in again] for name, stream in train.streams.items()} == {
        name: [stream[key] for key in again] for name, stream in anneal.streams.items() if name in train.streams
    }
    assert anneal.streams.keys() - train.streams.keys() == {"best"}


@pytest.mark.parametrize("path", PLANS, ids=str)
def test_comments_of_a_plan_are_true(path: Path) -> None:
    plan, _ = read_loaders(str(path), None)
    job = load_config(path.parent / "job_64_gpus.toml", ASSETS)
    [(steps, billions)] = re.findall(r"([\d,]+) steps, (\d+) billion tokens", path.read_text())
    assert int(steps.replace(",", "")) == job.training.steps - plan.stages[-1].from_step + 1
    tokens = int(steps.replace(",", "")) * job.training.global_batch_size * job.training.seq_len
    assert tokens == pytest.approx(int(billions) * 1e9, rel=0.01)
    skips = re.findall(r"^# (\[\[skip\]\](?:\n# .*)+)", path.read_text(), re.MULTILINE)
    check_tables(tomllib.loads(re.sub(r"^# ", "", skips[0], flags=re.MULTILINE)), str(path))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_commands_and_numbers_in_comments_are_true(job: Path) -> None:
    text = job.read_text()
    named = re.findall(r"(?<![\w./-])configs/[\w./]+", text)
    assert str(job) in named
    assert all(Path(name).is_file() for name in named), named
    config = load_config(job, ASSETS)
    for factor, product in re.findall(r"x ([\d,]+) = ([\d,]+) tokens", text):
        assert int(factor.replace(",", "")) == config.training.seq_len
        assert int(product.replace(",", "")) == config.training.seq_len * config.training.global_batch_size
    for factor, count, unit in re.findall(r"x ([\d,]+) = (\d+) (million|billion|trillion) tokens", text):
        tokens = config.training.steps * int(factor.replace(",", ""))
        assert abs(tokens / (int(count) * UNITS[unit]) - 1) < 0.01


def test_no_recipe_goes_on_from_the_checkpoints_of_another() -> None:
    configs = [load_config(job, ASSETS) for job in JOBS]
    folders = [config.job.dump_folder if IS_0_2 else config.dump_folder for config in configs]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_launch_script_is_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=20)


def test_launch_script_starts_torchrun_with_the_recipe(tmp_path: Path) -> None:
    """The command that it comes to, with a torchrun that only shows it."""
    shown = tmp_path / "torchrun"
    shown.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    ended = subprocess.run(
        ["configs/launch/multinode.sh", "configs/llama3_8b/job_64_gpus.toml", "configs/llama3_8b/train.toml",
         "configs/llama3_8b/validation.toml", "--training.steps=20"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NNODES": "8", "MASTER": "node-0"},
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    words = ended.stdout.split("\n")
    assert {"--nnodes=8", "--nproc_per_node=8", "--rdzv_backend=c10d", "--rdzv_endpoint=node-0:29400"} <= set(words)
    arguments = get_args_parser().parse_args(words[:-1])
    assert arguments.signals_to_handle.split(",") == [number.name for number in SIGNALS]
    [seconds] = re.findall(r"#SBATCH --signal=B:TERM@(\d+)", Path("configs/launch/slurm.sh").read_text())
    assert arguments.shutdown_timeout < int(seconds)
    assert words[words.index("-m") :] == [
        *("-m", "examples.mosaic_streaming.train", "--config", "configs/llama3_8b/job_64_gpus.toml"),
        *("--mosaic-config", "configs/llama3_8b/train.toml"),
        *("--mosaic-validation-config", "configs/llama3_8b/validation.toml", "--", "--training.steps=20", ""),
    ]


@pytest.mark.parametrize("number", SAVING)
def test_slurm_job_passes_its_signal_on_and_is_queued_again(tmp_path: Path, number: signal.Signals) -> None:
    """With commands of Slurm's that only write down what they are told."""
    root = tmp_path / "repository"
    shutil.copytree("configs/launch", root / "configs/launch")
    commands = {
        "scontrol": 'if [ "$1" = show ]; then printf "node-0\\nnode-1\\n"; else echo "scontrol $*"; fi',
        "srun": "trap 'echo srun ends; exit 143' TERM\n"
        'echo "srun $* on $MASTER of $NNODES"; for i in {1..300}; do sleep 0.1; done',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/activate").touch()
    log = tmp_path / "log"
    job = {
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "96",
    }
    with log.open("w") as file:
        script = subprocess.Popen(
            ["bash", "configs/launch/slurm.sh", "job.toml", "train.toml"],
            cwd=root,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **job},
            stdout=file,
            stderr=file,
        )
    try:
        until = time.monotonic() + 20
        while "srun" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        script.send_signal(number)
        assert script.wait(timeout=20) == 0
    finally:
        script.kill()
    assert log.read_text().splitlines() == [
        "srun --cpus-per-task=96 --kill-on-bad-exit=1 configs/launch/multinode.sh job.toml train.toml on node-0 of 2",
        "srun ends",
        "scontrol requeue 7",
    ]
