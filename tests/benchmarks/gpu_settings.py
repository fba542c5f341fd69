"""The settings of `tests.benchmarks.gpu`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Model:
    """How a flavor of Llama 3 is measured.

    Attributes:
        batch_tokens: of a GPU's batch: what the model's activations leave room for in 80 GB.
        rounds: in each of which each source of batches has its turn.
        has_aims: whether the aims are for it.
    """

    batch_tokens: int
    rounds: int
    has_aims: bool


MODELS = {"1B": Model(16384, 6, has_aims=True), "debugmodel": Model(65536, 12, has_aims=False)}
PARTS = (*MODELS, "attention")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are those of a GPU.

    Attributes:
        only: parts.
        seq_len: tokens of a sequence.
        window: steps of half a turn; the first half doesn't count.
        rounds: of turns; without, those of `MODELS`.
        batch_tokens: of a GPU's batch; without, those of `MODELS`.
        data_tokens: of the whole text.
        num_workers: processes per rank that read for each of the two loaders.
        nproc_per_node: GPUs.
        part_minutes: of one part at most.
        minutes: of all parts at most.
        cpu: whether this is a trial.
        out: the JSON file; without, `outputs/bench/gpu.json`, or, of parts, with their names.
    """

    only: Sequence[str] = PARTS
    seq_len: int = 8192
    window: int = 8
    rounds: int | None = None
    batch_tokens: int | None = None
    data_tokens: int = 1 << 24
    num_workers: int = 1
    nproc_per_node: int = 1
    part_minutes: float = 4.0
    minutes: float = 10.0
    cpu: bool = False
    out: str | None = None

    @property
    def file(self) -> Path:
        """The JSON file."""
        names = [] if tuple(self.only) == PARTS else self.only
        return Path(self.out or f"outputs/bench/{'-'.join(['gpu', *names])}.json")


CPU = Settings(seq_len=256, window=2, rounds=2, batch_tokens=512, data_tokens=1 << 18, cpu=True)


def parse(argv: list[str], has_gpu: bool, about: str = "") -> Settings:
    """The settings of a command line, whose help says what the program is about."""
    parser = argparse.ArgumentParser(
        description=f"{about}\n{Settings.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    for name in ("seq-len", "window", "rounds", "batch-tokens", "data-tokens", "num-workers", "nproc-per-node"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("part-minutes", "minutes"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--cpu", action="store_true", default=None, help="tiny settings, also where there is a GPU")
    parser.add_argument("--out", metavar="FILE")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return dataclasses.replace(Settings() if has_gpu and "cpu" not in given else CPU, **given)
