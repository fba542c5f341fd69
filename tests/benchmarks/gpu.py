"""What our loader costs in training on GPUs, and whether attention within documents runs there: make bench-gpu

    python -W ignore -m tests.benchmarks.gpu --nproc-per-node 1

Three ways to the same batches, each a torchrun of its own (`gpu_job.py`), in turns: `mosaic`, this project's loader on
a stream of tokens; `text`, TorchTitan's loader, which tokenizes the same text as it goes; `memory`, one batch again and
again. The two loaders have as many workers. Figures are those that TorchTitan itself writes for TensorBoard: a run is
four windows of as many steps, of which the first warms up. Then the command of the README trains with flex and with
varlen attention. Without a GPU, or with --cpu, all but that is tried with tiny settings on the CPU.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.mosaic_streaming.make_demo_data import sources
from examples.mosaic_streaming.train import PACKAGES
from tests.benchmarks.gpu_figures import WAYS, Row, Run, compare, read_scalars, summarize, table
from tests.benchmarks.measure import cpu_model
from tests.benchmarks.text import load_tokenizer, write_jsonl, write_rows

JOB = "examples/mosaic_streaming/configs/mosaic_job.toml"
WINDOWS = 4
"""Of a run; the first is not counted."""
BATCH_TOKENS = {"debugmodel": 65536, "1B": 16384}
"""Tokens of a GPU's batch: what the model's activations leave room for in 80 GB."""
ATTENTION = ("debugmodel_flex_attn", "debugmodel_varlen_attn")
ATTENTION_STEPS = 12
SHARD = 1 << 24
"""Bytes of a shard."""
KEPT_OF_LOG = 6000
"""Characters that are shown of a failed run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are those of a GPU.

    Attributes:
        models: flavors of Llama 3.
        seq_len: tokens of a sequence.
        steps: of a run.
        repeats: rounds, in each of which each way has its turn with each model and `seq_len`.
        batch_tokens: of a GPU's batch; without, `BATCH_TOKENS`.
        data_tokens: of the whole text.
        num_workers: processes per rank that read for both loaders.
        nproc_per_node: GPUs.
        minutes: no round begins that would probably not end by then.
        timeout: seconds for one torchrun.
        cpu: whether this is a trial.
        out: the JSON file.
    """

    models: Sequence[str] = ("debugmodel", "1B")
    seq_len: Sequence[int] = (4096, 8192)
    steps: int = 40
    repeats: int = 3
    batch_tokens: int | None = None
    data_tokens: int = 1 << 24
    num_workers: int = 1
    nproc_per_node: int = 1
    minutes: float = 24.0
    timeout: float = 300.0
    cpu: bool = False
    out: str = "outputs/bench/gpu.json"


CPU = Settings(
    models=("debugmodel",), seq_len=(256,), steps=8, repeats=1, batch_tokens=512, data_tokens=1 << 18, cpu=True
)


def parse(argv: list[str], has_gpu: bool) -> Settings:
    """The settings of a command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{Settings.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="FLAVOR")
    parser.add_argument("--seq-len", nargs="+", type=int, metavar="TOKENS")
    for name in ("steps", "repeats", "batch-tokens", "data-tokens", "num-workers", "nproc-per-node"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("minutes", "timeout"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--cpu", action="store_true", default=None, help="tiny settings, also where there is a GPU")
    parser.add_argument("--out", metavar="FILE")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    settings = dataclasses.replace(Settings() if has_gpu and "cpu" not in given else CPU, **given)
    if settings.steps % WINDOWS or settings.steps < 1:
        parser.error(f"--steps {settings.steps}: expected a multiple of {WINDOWS}, as a run has so many windows")
    return settings


def write_data(folder: Path, seq_lens: Iterable[int], wanted: int) -> int:
    """Write the standard library's sources, again and again, as `text.jsonl` and, tokenized, as streams.

    Returns:
        tokens of the whole text, at least as many as wanted.
    """
    tokens = write_jsonl(folder / "text.jsonl", itertools.cycle(sources()), wanted)
    for seq_len in seq_lens:
        write_rows(folder / str(seq_len), tokens, seq_len, SHARD)
    return len(tokens)


def write_loader(data: Path, seq_len: int, num_workers: int, **dataset: int) -> Path:
    """Write the configuration of our loader."""
    lines = ['name = "text"', f"num_workers = {num_workers}", "[dataset]", f'local = "{data / str(seq_len)}"']
    lines += ["shuffle = true", *(f"{key} = {value}" for key, value in dataset.items())]
    path = data / f"loader-{seq_len}{''.join(dataset)}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of_batch(settings: Settings, flavor: str, seq_len: int) -> int:
    """Sequences in a GPU's batch."""
    return max(1, (settings.batch_tokens or BATCH_TOKENS.get(flavor, min(BATCH_TOKENS.values()))) // seq_len)


def titan_flags(settings: Settings, flavor: str, seq_len: int, steps: int, log_freq: int) -> list[str]:
    """TorchTitan's flags that all runs have."""
    flags = [f"--model.flavor={flavor}", f"--training.seq_len={seq_len}", "--debug.seed=1"]
    flags += [f"--training.local_batch_size={rows_of_batch(settings, flavor, seq_len)}", f"--training.steps={steps}"]
    flags += [f"--training.mixed_precision_param={'float32' if settings.cpu else 'bfloat16'}"]
    return [*flags, "--metrics.enable_tensorboard", f"--metrics.log_freq={log_freq}"]


def torchrun(settings: Settings, data: Path, module: Sequence[str]) -> list[Row]:
    """Run a module in all ranks, and read what TorchTitan has written for TensorBoard.

    Raises:
        RuntimeError: the run failed, or didn't end in time.
    """
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HOME": str(data / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if settings.cpu:  # threads that wait for each other are slow where others compute, too
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={settings.nproc_per_node}", "-m", *module]
    with tempfile.TemporaryDirectory(dir=data) as name, open(data / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [*command, f"--job.dump_folder={name}"], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = process.wait(settings.timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.terminate()  # torchrun then ends its ranks, in half a minute at most
            process.wait(60)
        if code != 0:
            log.seek(0)
            ended = f"ended with {code}" if code is not None else f"took more than {settings.timeout:g} s"
            raise RuntimeError(f"{' '.join(module)} {ended}:\n{log.read()[-KEPT_OF_LOG:]}")
        return read_scalars(Path(name))


def measure(settings: Settings, data: Path, model: str, seq_len: int, repeat: int) -> list[Run]:
    """One run in each way; another one begins in each repeat.

    Raises:
        RuntimeError: one fails, or trains on another number of tokens than the settings say.
    """
    loader, window = write_loader(data, seq_len, settings.num_workers), settings.steps // WINDOWS
    flags = [f"--job.config_file={JOB}", *titan_flags(settings, model, seq_len, settings.steps, window)]
    flags += [f"--training.dataloader.num_workers={settings.num_workers}", "--activation_checkpoint.mode=selective"]
    flags += [] if settings.cpu else ["--compile.enable"]
    asked = rows_of_batch(settings, model, seq_len) * seq_len * settings.steps * settings.nproc_per_node
    runs = []
    for turn in range(len(WAYS)):
        way = WAYS[(repeat + turn) % len(WAYS)]
        module = ["tests.benchmarks.gpu_job", way, str(loader), str(data / "text.jsonl"), *flags]
        figures = summarize(torchrun(settings, data, module), window)
        if figures["tokens"] != asked:
            raise RuntimeError(f"{way} trained {model} on {figures['tokens']:,.0f} tokens, expected {asked:,}")
        print(f"{model} {seq_len} repeat {repeat} {way}: {figures['tokens_per_second']:,.0f} tokens/s", flush=True)
        runs.append({"model": model, "seq_len": seq_len, "repeat": repeat, "way": way, **figures})
    return runs


def train_within_documents(settings: Settings, data: Path, flavor: str) -> list[Run]:
    """Train with the command of the README on text whose documents attention keeps apart.

    Raises:
        RuntimeError: it fails, or doesn't learn.
    """
    seq_len = settings.seq_len[0]
    _, _, eos_id = load_tokenizer()
    loader = write_loader(data, seq_len, settings.num_workers, eos_token_id=eos_id)
    files = ["examples.mosaic_streaming.train", "--config", JOB, "--mosaic-config", str(loader), "--"]
    rows = torchrun(settings, data, [*files, *titan_flags(settings, flavor, seq_len, ATTENTION_STEPS, log_freq=1)])
    losses = [row["loss"] for row in rows]
    if len(losses) < ATTENTION_STEPS or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"{flavor}: expected {ATTENTION_STEPS} finite losses that fall, got {losses}")
    return [{"flavor": flavor, "seq_len": seq_len, "losses": losses}]


def machine() -> dict[str, Any]:
    """What this runs on."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpu": gpus[0] if gpus else None, "gpus": len(gpus), "cpu": cpu_model(), "cpus": os.cpu_count()}


def left_out(settings: Settings) -> dict[str, str]:
    """Which flavors with attention within documents can't be trained here, and why."""
    if settings.cpu:
        return dict.fromkeys(ATTENTION, "flex and varlen attention need a GPU")
    from torchtitan.models.llama3 import llama3_args

    return {flavor: "this TorchTitan has no such flavor" for flavor in ATTENTION if flavor not in llama3_args}


def bench(settings: Settings, data: Path, report: dict[str, Any]) -> None:
    """Fill in a report; it is written after each part, so that what is measured isn't lost."""

    def attempt(part: str, what: Callable[[], list[Run]]) -> None:
        try:
            report[part] += what()
        except RuntimeError as error:
            report["failures"].append(str(error))
            print(f"FAILED: {error}", flush=True)
        report.update(comparisons=compare(report["runs"]), minutes=(time.monotonic() - begin) / 60)
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n")

    begin, took = time.monotonic(), dict[tuple[str, int], float]()
    report["data_tokens"] = write_data(data, settings.seq_len, settings.data_tokens)
    for flavor in ATTENTION:
        if flavor in report["left_out"]:
            print(f"{flavor} is left out: {report['left_out'][flavor]}.", flush=True)
        else:
            attempt("attention", partial(train_within_documents, settings, data, flavor))
    for repeat, model, seq_len in itertools.product(range(settings.repeats), settings.models, settings.seq_len):
        now = time.monotonic()
        expected = took.get((model, seq_len), max(took.values(), default=0.0))
        if now - begin + expected > settings.minutes * 60:
            report["left_out"][f"{model} {seq_len} repeat {repeat}"] = f"--minutes {settings.minutes:g} are over"
            continue
        attempt("runs", partial(measure, settings, data, model, seq_len, repeat))
        took[model, seq_len] = time.monotonic() - now


def main() -> None:
    """Measure, print a table and write the JSON file."""
    settings = parse(sys.argv[1:], torch.cuda.is_available())
    if settings.cpu:
        print("No GPU, or --cpu: a trial with tiny settings on the CPU. Its figures say nothing of training on GPUs.")
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    report: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    report |= {"versions": versions, "settings": dataclasses.asdict(settings), "left_out": left_out(settings)}
    report |= {"attention": [], "runs": [], "comparisons": [], "failures": [], "minutes": 0.0}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        bench(settings, Path(folder), report)
    Path(settings.out).write_text(json.dumps(report, indent=2) + "\n")  # with what is left out at the end
    print(f"\n{json.dumps(report['machine'] | versions)}\n\n{table(report['comparisons'])}\n")
    for one in report["attention"]:
        print(f"{one['flavor']}: loss {one['losses'][0]:.3f} to {one['losses'][-1]:.3f} in {ATTENTION_STEPS} steps")
    for what, why in report["left_out"].items():
        print(f"left out: {what}: {why}")
    print(f"{settings.out} has all values; {report['minutes']:.1f} minutes, {len(report['failures'])} failures")
    sys.exit(bool(report["failures"]) or not report["runs"])


if __name__ == "__main__":
    main()
