"""Stock TorchTitan on local JSONL, also where there is no GPU: python -m tests.benchmarks.stock FILE FLAGS"""

import sys

from examples.mosaic_streaming.upstream import cpu

cpu.prepare_torchtitan()

from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan.train import Trainer

from tests.benchmarks.jsonl import name_jsonl

if __name__ == "__main__":
    init_logger()
    flags = [f"--training.dataset={name_jsonl()}", f"--training.dataset_path={sys.argv[1]}", *sys.argv[2:]]
    Trainer(ConfigManager().parse_args(flags)).train()
