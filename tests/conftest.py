"""Imports everything once, so that ranks forked from here start at once."""

import os
import warnings

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads doesn't survive a fork

warnings.filterwarnings("ignore", "pkg_resources is deprecated")

from examples.mosaic_streaming import cpu  # noqa: F401  # isort: skip

import torch
import torch._dynamo
import torchtitan.models.llama3
import torchtitan.train  # noqa: F401

import examples.mosaic_streaming.dataloader
import examples.mosaic_streaming.tokenizer
import examples.mosaic_streaming.train  # noqa: F401

torch.set_num_threads(1)
