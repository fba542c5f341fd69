"""What our loader costs in training on GPUs, and whether attention within documents runs there: make bench-gpu

    python -W ignore -m tests.benchmarks.gpu --only 1B debugmodel --nproc-per-node 1

A part trains one model in one torchrun (`gpu_job.py`), whose batches come in turns from TorchTitan's loader, which
tokenizes text as it goes, from this project's, which reads a stream of the same tokens, and from memory. The two
loaders have as many workers. Figures are those that TorchTitan itself writes for TensorBoard. The part `attention` runs
the command of the README with flex and with varlen attention.

A part takes at most 4 minutes, and all of them 10. A model that isn't done by then is stopped, and the rounds that it
has finished count. Without a GPU, or with --cpu, all but what needs one is tried with tiny settings on the CPU.
"""

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
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.mosaic_streaming.make_demo_data import sources
from examples.mosaic_streaming.train import PACKAGES
from tests.benchmarks.gpu_figures import ROUND, Row, Run, figures_of_turns, findings, read_scalars
from tests.benchmarks.gpu_settings import MODELS, PARTS, Settings, parse
from tests.benchmarks.measure import cpu_model, show, written
from tests.benchmarks.text import load_tokenizer, write_jsonl, write_rows

JOB = "examples/mosaic_streaming/configs/mosaic_job.toml"


FLAVORS = ("debugmodel_flex_attn", "debugmodel_varlen_attn")
"""Of the part `attention`."""
ATTENTION_STEPS = 12
SHARD = 1 << 24
"""Bytes of a shard."""
TO_STOP = 35.0
"""Seconds that a run gets to end by itself; torchrun kills ranks after 30."""
LEAST = 60.0
"""Seconds without which no part begins."""
KEPT_OF_LOG = 6000
"""Characters that are shown of a failed run."""


def write_data(folder: Path, seq_len: int, wanted: int) -> int:
    """Write the standard library's sources, again and again, as `text.jsonl` and, tokenized, as a stream.

    Returns:
        tokens of the whole text, at least as many as wanted.
    """
    tokens = write_jsonl(folder / "text.jsonl", itertools.cycle(sources()), wanted)
    write_rows(folder / "stream", tokens, seq_len, SHARD)
    return len(tokens)


def write_loader(data: Path, num_workers: int, **dataset: int) -> Path:
    """Write the configuration of our loader."""
    lines = ['name = "text"', f"num_workers = {num_workers}", "[dataset]", f'local = "{data / "stream"}"']
    lines += ["shuffle = true", *(f"{key} = {value}" for key, value in dataset.items())]
    path = data / f"{'-'.join(['loader', *dataset])}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def titan_flags(settings: Settings, flavor: str, batch_tokens: int, steps: int, log_freq: int) -> list[str]:
    """TorchTitan's flags that all runs have."""
    rows = max(1, (settings.batch_tokens or batch_tokens) // settings.seq_len)
    flags = [f"--model.flavor={flavor}", f"--training.seq_len={settings.seq_len}", "--debug.seed=1"]
    flags += [f"--training.local_batch_size={rows}", f"--training.steps={steps}"]
    flags += [f"--training.mixed_precision_param={'float32' if settings.cpu else 'bfloat16'}"]
    return [*flags, "--metrics.enable_tensorboard", f"--metrics.log_freq={log_freq}"]


def torchrun(settings: Settings, data: Path, end: float, module: Sequence[str]) -> list[Row]:
    """Run a module in all ranks, and read what TorchTitan has written for TensorBoard, also if it isn't done in time.

    Args:
        settings: of the benchmark.
        data: a folder to write to.
        end: when the run is over, on the clock of `time.monotonic`.
        module: its name and its arguments.

    Raises:
        RuntimeError: the run failed, or wrote nothing in time.
    """
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HOME": str(data / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if settings.cpu:  # threads that wait for each other are slow where others compute, too
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={settings.nproc_per_node}", "-m", *module]
    with tempfile.TemporaryDirectory(dir=data) as name, open(data / "log.txt", "w+") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            [*command, f"--job.dump_folder={name}"], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = process.wait(max(0.0, end - TO_STOP - begin))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.terminate()  # torchrun then ends its ranks, which write what they have logged
            process.wait(2 * TO_STOP)
        rows = read_scalars(Path(name))
        if code or not rows:
            log.seek(0)
            ended = f"ended with {code}" if code is not None else f"was stopped after {time.monotonic() - begin:.0f} s"
            raise RuntimeError(f"{' '.join(module)} {ended}:\n{log.read()[-KEPT_OF_LOG:]}")
        return rows


def train_in_turns(settings: Settings, data: Path, end: float, part: str) -> list[Run]:
    """Train a model with batches from each source in turns, and return the figures of the turns.

    Raises:
        RuntimeError: it fails, or finishes no round in time.
    """
    model, loader = MODELS[part], write_loader(data, settings.num_workers)
    steps = (settings.rounds or model.rounds) * ROUND * settings.window
    flags = [f"--job.config_file={JOB}", *titan_flags(settings, part, model.batch_tokens, steps, settings.window)]
    flags += [f"--training.dataloader.num_workers={settings.num_workers}", "--activation_checkpoint.mode=selective"]
    flags += [] if settings.cpu else ["--compile.enable"]
    module = ["tests.benchmarks.gpu_job", str(loader), str(data / "text.jsonl"), *flags]
    rows = torchrun(settings, data, end, module)
    if not (runs := figures_of_turns(rows, settings.window)):
        raise RuntimeError(f"{part} finished no round in time: it came to step {rows[-1]['step']} of {steps}")
    return runs


def train_within_documents(settings: Settings, data: Path, end: float, flavor: str) -> Run:
    """Train with the command of the README on text whose documents attention keeps apart.

    Raises:
        RuntimeError: it fails, or doesn't learn.
    """
    _, _, eos_id = load_tokenizer()
    loader = write_loader(data, settings.num_workers, eos_token_id=eos_id)
    files = ["examples.mosaic_streaming.train", "--config", JOB, "--mosaic-config", str(loader), "--"]
    flags = titan_flags(settings, flavor, MODELS["debugmodel"].batch_tokens, ATTENTION_STEPS, log_freq=1)
    losses = [row["loss"] for row in torchrun(settings, data, end, [*files, *flags])]
    if len(losses) < ATTENTION_STEPS or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"{flavor}: expected {ATTENTION_STEPS} finite losses that fall, got {losses}")
    return {"flavor": flavor, "seq_len": settings.seq_len, "losses": losses}


def machine() -> dict[str, Any]:
    """What this runs on."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpu": gpus[0] if gpus else None, "gpus": len(gpus), "cpu": cpu_model(), "cpus": os.cpu_count()}


def left_out(settings: Settings) -> dict[str, str]:
    """Which parts aren't run, and why."""
    not_here = {"1B": "its model is too large for a CPU", "attention": "flex and varlen attention need a GPU"}
    found = {part: why for part, why in not_here.items() if settings.cpu}
    return found | {part: "--only names others" for part in PARTS if part not in settings.only}


def measure(settings: Settings, data: Path, end: float, part: str, report: dict[str, Any]) -> None:
    """Fill in what a part has found, and print it. RuntimeError if it fails."""
    if part == "attention":
        for flavor in FLAVORS:
            report["attention"].append(trained := train_within_documents(settings, data, end, flavor))
            losses = trained["losses"]
            print(f"{flavor}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps", flush=True)
        return
    report["runs"][part] = runs = train_in_turns(settings, data, end, part)
    found = findings(part, settings.seq_len, runs, MODELS[part].has_aims)
    report["results"][part] = [written(finding) for finding in found]
    done, asked = runs[-1]["round"] + 1, settings.rounds or MODELS[part].rounds
    if done < asked:
        report["left_out"][f"rounds {done + 1} to {asked} of {part}"] = "the part's time was over"
    print(show(found), flush=True)


def bench(settings: Settings, data: Path, report: dict[str, Any]) -> None:
    """Run the parts and fill in a report; it is written after each part, so that what is measured isn't lost."""
    begin = time.monotonic()
    report["data_tokens"] = write_data(data, settings.seq_len, settings.data_tokens)
    for part in (part for part in settings.only if part not in report["left_out"]):
        now = time.monotonic()
        end = min(now + settings.part_minutes * 60, begin + settings.minutes * 60)
        print(f"\n{part}, {end - now:.0f} s at most\n", flush=True)
        if end - now < LEAST:
            report["left_out"][part] = f"the {settings.minutes:g} minutes are over"
            continue
        try:
            measure(settings, data, end, part, report)
        except RuntimeError as error:
            report["failures"].append(str(error))
            print(f"FAILED: {error}", flush=True)
        report["seconds"][part] = round(time.monotonic() - now, 1)
        settings.file.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Measure, print tables and write the JSON file."""
    settings = parse(sys.argv[1:], torch.cuda.is_available(), __doc__)
    if settings.cpu:
        print("No GPU, or --cpu: a trial with tiny settings on the CPU. Its figures say nothing of training on GPUs.")
    settings.file.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    report: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    report |= {"versions": versions, "settings": dataclasses.asdict(settings), "left_out": left_out(settings)}
    report |= {"attention": [], "runs": {}, "results": {}, "failures": [], "seconds": {}}
    print(json.dumps(report["machine"] | versions), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        bench(settings, Path(folder), report)
    settings.file.write_text(json.dumps(report, indent=2) + "\n")  # with what is left out at the end
    print()
    for what, why in report["left_out"].items():
        print(f"left out: {what}: {why}")
    seconds = sum(report["seconds"].values())
    print(f"{settings.file} has all values; {seconds:.0f} s, {len(report['failures'])} failures")
    sys.exit(bool(report["failures"]) or not (report["runs"] or report["attention"]))


if __name__ == "__main__":
    main()
