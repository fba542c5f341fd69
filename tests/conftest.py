"""Imports everything once, so that ranks forked from here start at once."""

import os
import signal
import warnings

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA doesn't survive a fork: tests run on the CPU everywhere
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads doesn't survive a fork

warnings.filterwarnings("ignore", "pkg_resources is deprecated")

from examples.mosaic_streaming import cpu

cpu.prepare_torchtitan()

import torch
import torch._dynamo
import torchtitan.models.llama3
import torchtitan.train  # noqa: F401

import examples.mosaic_streaming.dataloader
import examples.mosaic_streaming.tokenizer
import examples.mosaic_streaming.train  # noqa: F401

torch.set_num_threads(1)

# The import of composer 0.32.1 sets handlers that raise SystemExit, which is lost in the first moments after a fork.
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
