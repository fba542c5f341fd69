"""TorchTitan's features that touch data or what becomes of it, on Mosaic streams. Accumulation is in `test_layouts`."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged, losses, train
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import SEQ_LEN, sample_tokens, write_stream
from tests.support.titan import only_0_2

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""Of TorchTitan's Llama 3 debug model."""

SAME = tuple(range(8))
"""The samples of a stream of which each global batch takes all."""


@pytest.fixture
def same(files: Path) -> Path:
    """Files whose global batch is the whole stream: each step has the same samples."""
    shutil.rmtree(files / "stream")
    write_stream(files / "stream", len(SAME))
    (files / "loader.toml").write_text(f'name = "text"\n[dataset]\nlocal = "{files}/stream"\nnum_canonical_nodes = 1\n')
    return files


def transformers_loss(folder: Path) -> float:
    """The loss that transformers computes on these samples with the weights in a folder."""

    def compute() -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        tokens = torch.tensor([sample_tokens(sample).tolist() for sample in SAME])
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss)

    [loss] = run_rank_values(compute)
    return float(loss)


@pytest.mark.long
def test_last_checkpoint_in_hf_form_is_loaded_by_transformers_and_by_the_next_run(same: Path) -> None:
    """Both ways agree on the loss of a batch: the trained weights have gone out, and in again."""
    batch = ("--training.global_batch_size=8", "--training.local_batch_size=8")
    in_hf = ("--checkpoint.enable", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")
    train(same, *batch, "--training.steps=3", "--checkpoint.interval=2", *in_hf)
    saved = same / "outputs/checkpoint/step-3"
    [again] = run_ranks(lambda: main(command(same, *batch, "--training.steps=4", *in_hf)))
    assert again.code == 1
    assert f"ConfigError: {saved} is a model in Hugging Face's form" in again.output
    assert f"Move it out of {same}/outputs/checkpoint to go on from step 2. Or begin a new run" in again.output
    saved = saved.rename(same / "model")
    [on] = train(same, *batch, "--training.steps=4", *in_hf)
    assert list(losses(on.output)) == [3, 4]
    assert list(saved.glob("*.safetensors"))
    (saved / "config.json").write_text(json.dumps(HF_CONFIG))
    loss = transformers_loss(saved)
    [rank] = train(same, *batch, "--training.steps=1", "--checkpoint.enable", "--checkpoint.folder=on",
                   f"--checkpoint.initial_load_path={saved}", "--checkpoint.initial_load_in_hf")  # fmt: skip
    assert abs(logged([rank])[1] - loss) < 2e-4
    assert loss < 7.7, "it has learned"


@pytest.mark.long
def test_compiled_model_trains_as_the_eager_one(files: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    flags = ("--training.steps=3", "--debug.seed=1")
    eager = logged(train(files, *flags))
    compiled = logged(train(files, *flags, "--compile.enable"))
    assert list(compiled) == [1, 2, 3]
    assert all(abs(compiled[step] - eager[step]) < 1e-3 for step in eager)


def test_profiler_writes_its_traces(files: Path) -> None:
    train(files, "--training.steps=4", "--profiling.enable_profiling", "--profiling.profile_freq=4",
          "--profiling.profiler_active=1", "--profiling.profiler_warmup=1")  # fmt: skip
    [trace] = (files / "outputs").rglob("rank0_trace.json*")
    text = trace.read_text() if trace.suffix == ".json" else gzip.decompress(trace.read_bytes()).decode()
    assert "traceEvents" in text


@pytest.mark.long
def test_weights_and_biases_offline_has_the_losses_and_the_data(files: Path) -> None:
    pytest.importorskip("wandb")

    def run() -> None:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        main(command(files, "--training.steps=3", "--metrics.enable_wandb"))

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    [record] = (files / "outputs").rglob("*.wandb")
    for key in (b"loss_metrics/global_avg_loss", b"data/epoch_progress", b"data/targets_seen", b"data/shards_fetched"):
        assert key in record.read_bytes()


@only_0_2
def test_float8_flags_reach_torchtitan(files: Path) -> None:
    """It says what it misses here: float8 is for GPUs from H100 on."""
    [rank] = run_ranks(lambda: main(command(files, "--model.converters=quantize.linear.float8", "--training.steps=1")))
    assert rank.code == 1
    assert "Failed to swap to Float8Linear because float8 is only supported on SM89 or later." in rank.output
