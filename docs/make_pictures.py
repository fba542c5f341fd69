"""Make the pictures of docs/ from the demo data: `make pictures`.

`show.svg` and `plan.svg` are what the commands print in a terminal. `metrics.png` is drawn from the TensorBoard logs of
a run of the demo model that fetches its stream, and goes on from its checkpoint on two ranks.
"""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE, OUT = Path(__file__).parent, Path("outputs/pictures")
CONFIGS = "examples/mosaic_streaming/configs"
FILES = ["--config", f"{CONFIGS}/mosaic_job.toml", "--mosaic-config"]
LOADER = f"""\
name = "text"
num_workers = 1
[dataset]
remote = "data/demo"
local = "{OUT}/cache"
split = "train"
shuffle = true
shuffle_block_size = 1024
batching_method = "blend"
validate_hash = "xxh64"
"""
COLUMNS = 124
SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#292929"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""
RUNS = [(1, 80), (2, 160)]
"""Ranks, and the step that they go to; a global batch is 16 samples."""
CURVES = {
    "loss_metrics/global_avg_loss": "loss",
    "data/passes/dataset": "passes over the stream (data/passes/dataset)",
    "data/tokens_seen": "tokens read (data/tokens_seen)",
    "data/bytes_fetched": "bytes fetched since the start (data/bytes_fetched)",
}


def picture(name: str, *command: str) -> None:
    """Keep what a command of `preview` prints in a terminal."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    module = [sys.executable, "-W", "ignore", "-m", "examples.mosaic_streaming.preview"]
    done = subprocess.run([*module, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    console = Console(width=COLUMNS, record=True, file=io.StringIO())
    console.print(Text.from_ansi(done.stdout))
    (HERE / f"{name}.svg").write_text(console.export_svg(code_format=SVG, unique_id=name))


def train() -> list[Path]:
    """Train in parts, each going on from the one before; the folders of their TensorBoard logs."""
    logs: list[Path] = []
    for ranks, steps in RUNS:
        flags = [f"--job.dump_folder={OUT}", f"--training.steps={steps}", "--training.global_batch_size=16"]
        flags += ["--checkpoint.enable", "--metrics.enable_tensorboard", f"--metrics.save_tb_folder=tb-{ranks}"]
        torchrun = [f"{Path(sys.executable).parent}/torchrun", f"--nproc_per_node={ranks}"]
        module = ["-m", "examples.mosaic_streaming.train", *FILES, f"{OUT}/loader.toml", "--", *flags]
        subprocess.run([*torchrun, *module], check=True)
        logs += (OUT / f"tb-{ranks}").iterdir()
    return logs


def draw(logs: list[Path]) -> None:
    """Draw the curves of all parts."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, (tag, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for log, (ranks, _) in zip(logs, RUNS, strict=True):
            events = EventAccumulator(str(log)).Reload().Scalars(tag)
            axes.plot(
                [event.step for event in events],
                [event.value for event in events],
                label=f"on {ranks} rank{'s' * (ranks > 1)}",
            )
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(HERE / "metrics.png", dpi=80)


def main() -> None:
    """Make all pictures."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / "loader.toml").write_text(LOADER)
    demo = [*FILES, f"{CONFIGS}/mosaic_dataloader.toml"]
    picture("show", "show", "--rows", "1", *demo)
    flags = ["--parallelism.tensor_parallel_degree=4", "--parallelism.pipeline_parallel_degree=2"]
    picture("plan", "plan", "--world-size", "16", *demo, "--", "--checkpoint.enable", "--training.steps=400", *flags)
    draw(train())


if __name__ == "__main__":
    main()
