"""TorchTitan's text loader on a file of JSON lines."""

from pathlib import Path

import datasets
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS


def name_jsonl() -> str:
    """The name under which TorchTitan then reads the `text` of JSON lines; what it makes of a file stays beside it."""
    datasets.disable_progress_bars()
    DATASETS["jsonl"] = DatasetConfig(
        path="",
        loader=lambda path: datasets.load_dataset(
            "json", data_files=path, split="train", cache_dir=f"{Path(path).parent}/cache"
        ),
        sample_processor=lambda sample: sample["text"],
    )
    return "jsonl"
