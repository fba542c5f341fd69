"""Attention that stays within documents: masks against a rule written out, and a packed row against its examples alone.

Flex attention is run without compiling it, which is the same function, and on the CPU.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchtitan.models.llama3.model.model as llama3
from streaming import MDSWriter
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.models.attention import FlexAttentionWrapper
from torchtitan.protocols.train_spec import get_train_spec

from examples.mosaic_streaming.batch.titan_batch import ends, positions
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.warnings import warnings_of_documents
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.placement import Layout
from examples.mosaic_streaming.titan import make_job
from examples.mosaic_streaming.titan.v0_2.models import masks_documents, takes_positions, within_documents
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged, losses, train, write_files
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.reading import TURN, write_turns
from tests.support.streams import (
    SEQ_LEN,
    TOKENIZER,
    build_loader,
    job,
    loader_config,
    resolved,
    sample_tokens,
    write_tokens,
)
from tests.support.titan import job_config, loaded
from tests.support.tokenizing import derive

ROWS = [[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 1, 1, 2, 3]]
SEQUENCE_ID = torch.tensor(ROWS)
IDS = torch.tensor([[5, 0, 6, 0, 0, 7, 0, 0], [0, 0, 8, 0, 9, 0, 0, 4]])
"""With EOS (0) anywhere: TorchTitan's own masks would follow it."""

EOS = 1
"""Of the debug tokenizer."""


def test_positions_begin_again_with_each_document() -> None:
    assert positions(SEQUENCE_ID).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 0, 0]]


def test_the_last_tokens_of_documents_are_found() -> None:
    assert ends(SEQUENCE_ID).int().tolist() == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1, 1, 1]]


def allowed(sequence_id: Tensor) -> Tensor:
    """Who may see whom, pair by pair: bool [rows, seq_len, seq_len]."""
    rows, length = sequence_id.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        for query in range(length):
            for key in range(query + 1):
                seen[row, query, key] = sequence_id[row, query] == sequence_id[row, key]
    return seen


def small_model(name: str, flavor: str) -> Any:
    """An object with the model's methods and arguments, without its weights."""
    spec = get_train_spec(name)
    model_cls: Any = within_documents(spec.model_cls)
    model = model_cls.__new__(model_cls)
    torch.nn.Module.__init__(model)
    model.model_args = spec.model_args[flavor]
    return model


@pytest.mark.parametrize(
    ("name", "flavor"),
    [
        ("llama3", "debugmodel_flex_attn"),
        ("llama3", "8B_flex"),
        ("llama4", "debugmodel_irope"),
        ("deepseek_v3", "debugmodel_flex_attn"),
    ],
)
def test_flex_masks_follow_the_documents(name: str, flavor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"torchtitan.models.{name}.model.model", fromlist=["model"])
    monkeypatch.setattr(module, "create_attention_mask", lambda mask_mod, *sizes: mask_mod)
    extra = {"sequence_id": SEQUENCE_ID, "positions": positions(SEQUENCE_ID)}
    masks = small_model(name, flavor).get_attention_masks(IDS, HuggingFaceTokenizer(TOKENIZER), extra)
    assert list(extra) == ["positions"], "the rest goes to `forward`"
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(8), torch.arange(8), indexing="ij")
    for mask_mod in masks.values() if isinstance(masks, dict) else [masks]:  # llama4's blocks are of 256 tokens
        assert torch.equal(mask_mod(row, torch.tensor(0), query, key), allowed(SEQUENCE_ID))


def test_varlen_lengths_follow_the_documents() -> None:
    model = small_model("llama3", "debugmodel_varlen_attn")
    found = model.get_attention_masks(IDS, HuggingFaceTokenizer(TOKENIZER), {"sequence_id": SEQUENCE_ID})
    assert found.cu_seq_q.tolist() == found.cu_seq_k.tolist() == [0, 3, 5, 6, 8, 9, 14, 15, 16]
    assert found.max_q == found.max_k == 5


def test_without_documents_masks_are_torchtitans() -> None:
    model = small_model("llama3", "debugmodel_varlen_attn")
    found = model.get_attention_masks(IDS, HuggingFaceTokenizer(TOKENIZER), {})
    own = llama3.Transformer.get_attention_masks(model, IDS, HuggingFaceTokenizer(TOKENIZER), {})
    assert found.cu_seq_q.tolist() == own.cu_seq_q.tolist()


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flex attention and make its masks as they are written, on the CPU."""
    monkeypatch.setattr(FlexAttentionWrapper, "_compiled_flex_attn", flex_attention)
    monkeypatch.setattr(llama3, "create_attention_mask", functools.partial(create_block_mask, device="cpu"))


@pytest.mark.parametrize("restart", [True, False])
def test_packed_examples_get_what_they_get_alone(eager_flex: None, restart: bool) -> None:
    torch.manual_seed(0)
    config = JobConfig()
    config.training.seq_len = 64
    spec = get_train_spec("llama3")
    args = spec.model_args["debugmodel_flex_attn"]
    args.update_from_config(config)
    model: Any = within_documents(spec.model_cls)(args)
    with torch.no_grad():
        model.init_weights()
    tokenizer = HuggingFaceTokenizer(TOKENIZER)
    lengths = [20, 1, 30, 13]
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 2048, (1, 64)))
    tokens[0, 5:8] = tokenizer.eos_id
    sequence_id = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]

    def logits(tokens: Tensor, sequence_id: Tensor) -> Tensor:
        extra = {"sequence_id": sequence_id} | ({"positions": positions(sequence_id)} if restart else {})
        masks = model.get_attention_masks(tokens, tokenizer, extra)
        with torch.no_grad():
            found: Tensor = model(tokens, attention_masks=masks, **extra)[0]
        return found

    together = logits(tokens, sequence_id)
    alone = [logits(part, torch.zeros_like(part)) for part in tokens.split(lengths, dim=1)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4
    mixed = logits(tokens, torch.zeros_like(sequence_id))
    assert (together[20:] - mixed[20:]).abs().max() > 1e-2, "without documents, examples see each other"


def test_flavors_that_mask_are_known() -> None:
    masking = {
        (name, flavor)
        for name in ("llama3", "llama4", "qwen3", "deepseek_v3", "gpt_oss")
        for flavor, args in get_train_spec(name).model_args.items()
        if masks_documents(args)
    }
    assert {("llama3", "8B_flex"), ("llama3", "8B_varlen"), ("deepseek_v3", "671B")} <= masking
    assert not {("llama3", "8B"), ("qwen3", "0.6B"), ("gpt_oss", "debugmodel")} & masking


@pytest.mark.parametrize(
    ("model", "flavor", "hint"),
    [
        *(
            (
                "llama3",
                "8B",
                "These flavors do, on a GPU: debugmodel_flex_attn, debugmodel_varlen_attn, 8B_flex, 8B_var",
            ),
        ),
        *(("qwen3", "0.6B", "No flavor of this model does."),),
        *(("llama3", "8B_flex", None),),
    ],
)
def test_flavors_that_keep_attention_within_documents_are_named(
    tmp_path: Path, model: str, flavor: str, hint: str | None
) -> None:
    config = job_config(model__name=f"{model}_mosaic", model__flavor=flavor, training__local_batch_size=2)
    stream = write_turns(tmp_path / "stream", 4)
    dataset = {"remote": str(stream), "local": str(tmp_path / "cache"), "packing_ratio": 2}
    told = warnings_of_documents(
        resolved({"name": "finetuning", "dataset": dataset}, 2), make_job(loaded(config, LoaderFile({}, "")), 1, 1)
    )
    assert len(told) == (hint is not None) and (not hint or "Rows are made of packed examples, and model.f" in told[0])
    assert hint is None or hint in told[0]


def test_positions_are_given_where_all_layers_get_them() -> None:
    single = Layout(1, 1, dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp"), 1))
    for name in ("pp", "cp", "tp"):
        assert not takes_positions(get_train_spec("llama3").model_cls, Layout(2, 2, {**single.degrees, name: 2}))
    assert takes_positions(get_train_spec("llama3").model_cls, single)
    assert not takes_positions(get_train_spec("gpt_oss").model_cls, single)


def test_varlen_under_pipeline_parallelism_is_refused() -> None:
    config = job_config(model__flavor="8B_varlen")
    make_job(loaded(config, LoaderFile({}, "")), 2, 2)
    config.parallelism.pipeline_parallel_degree = 2
    with pytest.raises(ConfigError, match="has varlen attention, whose masks pipeline parallelism"):
        make_job(loaded(config, LoaderFile({}, "")), 2, 2)


def test_tokenizer_without_an_eos_is_refused_where_masks_need_one(tmp_path: Path) -> None:
    config = job()
    config.model.hf_assets_path = str(derive(tmp_path / "assets", eos_token=None))
    write_tokens(tmp_path / "stream", [[20] * (SEQ_LEN + 1)] * 4)

    def build() -> None:
        build_loader(loader_config(tmp_path / "stream"), config)

    run_rank_values(build)
    config.model.flavor = "debugmodel_varlen_attn"
    with pytest.raises(
        AssertionError, match=r"ConfigError: model.flavor = .*/assets' has none. Set `eos_token` in its"
    ):
        run_rank_values(build)


@pytest.mark.parametrize(("key", "token"), [("eos_token_id", 0), ("bos_token_id", 1)])
def test_documents_of_concatenated_text_are_told_apart(tmp_path: Path, key: str, token: int) -> None:
    """An EOS ends its document; a BOS begins one. llm-foundry says where; the model gets it."""
    rows = [[20, 21, token, 22, 23, 24, token, 25, 26], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
    folder = write_tokens(tmp_path / "stream", rows)
    config = job(local_batch_size=2, seq_len=8)
    config.model.flavor = "debugmodel_varlen_attn"
    settings = {key: token, f"override_{key}_mismatch_error": True}

    def read() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        inputs, labels = next(iter(build_loader(loader_config(folder, **settings), config)))
        return inputs["sequence_id"].tolist(), inputs["positions"].tolist(), labels.tolist()

    [(sequence_id, position, labels)] = run_rank_values(read)
    if key == "eos_token_id":
        assert sequence_id[0] == [0, 0, 0, 1, 1, 1, 1, 2]
        assert position[0] == [0, 1, 2, 0, 1, 2, 3, 0]
    else:
        assert sequence_id[0] == [0, 0, 1, 1, 1, 1, 2, 2]
        assert position[0] == [0, 1, 0, 1, 2, 3, 0, 1]
    assert sequence_id[1] == [0] * 8
    assert labels == [row[1:] for row in rows], "each token is learned, as TorchTitan does in its own documents"


PACKED = {
    # rows of 77 tokens hold 4 examples of 18
    "debugmodel": ("1", ["--training.local_batch_size=8", "--training.global_batch_size=8"]),
    "debugmodel_flex_attn": ("4", ["--training.local_batch_size=2", "--training.global_batch_size=2"]),
    "debugmodel_varlen_attn": ("4", ["--training.local_batch_size=2", "--training.global_batch_size=2"]),
}
"""Packing ratio and flags of runs that learn from the same 8 examples in each step, each alone or packed."""


def write_examples(folder: Path) -> None:
    """Write a stream of 8 examples, which have EOS in their middle, too."""
    with MDSWriter(out=str(folder), columns=dict.fromkeys(TURN, "ndarray:int32")) as writer:
        for sample in range(8):
            tokens = sample_tokens(sample)
            tokens[8] = EOS
            writer.write({"input_ids": tokens[:4], "labels": tokens[4:]})


def packed_run(folder: Path, flavor: str) -> list[str]:
    """The arguments of a run of 3 steps."""
    ratio, flags = PACKED[flavor]
    loader = folder / f"{flavor}.toml"
    loader.write_text(
        f'name = "finetuning"\n[dataset]\nlocal = "{folder}/turns"\nremote = "{folder}/turns"\n'
        f"num_canonical_nodes = 1\npacking_ratio = {ratio}\n"
    )
    given = command(folder, f"--model.flavor={flavor}", "--training.seq_len=76", "--debug.seed=1", *flags)
    return [str(loader) if argument == f"{folder}/loader.toml" else argument for argument in given]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float | None, enable_gqa: bool, return_lse: bool
) -> Tensor:
    """What flex attention comes to, with gradients: on a CPU it has none."""
    assert not return_lse
    seen = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)


LAYOUTS = {
    "one rank": (1, []),
    "FSDP 2": (2, ["--training.local_batch_size=1"]),
    "TP 2": (2, ["--parallelism.tensor_parallel_degree=2"]),
    "PP 2": (2, ["--parallelism.pipeline_parallel_degree=2"]),
}
"""Ranks and flags."""


@pytest.fixture(scope="module")
def alone(module_path: Path) -> tuple[Path, dict[int, float]]:
    """Files with a seed checkpoint, and the losses of examples that are each in a row of their own."""
    folder = write_files(module_path)
    write_examples(folder / "turns")
    train(folder, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=seed")
    return folder, learn(folder, "debugmodel")


def learn(folder: Path, flavor: str, world_size: int = 1, flags: Sequence[str] = ()) -> dict[int, float]:
    """The losses of a run from the seed checkpoint."""
    seed = f"--checkpoint.initial_load_path={folder}/outputs/seed/step-0"
    given = [*packed_run(folder, flavor), "--checkpoint.enable", "--checkpoint.interval=1000", seed, *flags]
    given += [f"--checkpoint.folder={flavor}-{world_size}{''.join(flags).replace('/', '')}"]
    ranks = run_ranks(functools.partial(main, given), world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].output
    return logged(ranks)


@pytest.mark.parametrize(
    "layout",
    [layout if layout == "one rank" else pytest.param(layout, marks=pytest.mark.long) for layout in LAYOUTS],
)
def test_packed_examples_are_learned_as_each_alone(
    alone: tuple[Path, dict[int, float]], eager_flex: None, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The whole trainer: losses are the same, also after steps whose gradients came from packed rows."""
    monkeypatch.setattr(FlexAttentionWrapper, "_compiled_flex_attn", dense_attention)
    folder, expected = alone
    assert list(expected) == [1, 2, 3, 4]
    assert learn(folder, "debugmodel_flex_attn", *LAYOUTS[layout]) == pytest.approx(expected, abs=2e-5)


def test_validation_keeps_to_documents_as_training_does(
    files: Path, eager_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that don't change have the same loss in both, on the same samples."""
    monkeypatch.setattr(FlexAttentionWrapper, "_compiled_flex_attn", dense_attention)
    rows = [[*sample_tokens(sample, 6).tolist(), EOS, *sample_tokens(sample + 8, 10).tolist()] for sample in range(8)]
    write_tokens(files / "documents", rows)
    loader = f"{files}/documents.toml"
    Path(loader).write_text(
        f'name = "text"\n[dataset]\nlocal = "{files}/documents"\neos_token_id = {EOS}\nnum_canonical_nodes = 1\n'
    )
    flags = ["--training.steps=1", "--debug.seed=1", "--training.local_batch_size=8", "--training.global_batch_size=8"]
    flags += ["--validation.enable", f"--validation.seq_len={SEQ_LEN}", "--optimizer.lr=0"]
    found = {}
    for flavor in ("debugmodel_flex_attn", "debugmodel"):
        given = ["--config", f"{files}/job.toml", "--mosaic-config", loader, "--mosaic-validation-config", loader]
        [rank] = run_ranks(functools.partial(main, [*given, "--", f"--model.flavor={flavor}", *flags]))
        assert rank.code == 0, rank.output
        [validated] = re.findall(r"validate step: +1 +loss: +([\d.]+)", rank.output)
        assert float(validated) == pytest.approx(losses(rank.output)[1], abs=6e-5)  # four digits are logged
        found[flavor] = float(validated)
    assert abs(found["debugmodel"] - found["debugmodel_flex_attn"]) > 5e-4


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no GPU")
def test_packed_examples_are_learned_as_each_alone_on_a_gpu(files: Path) -> None:
    """Through torchrun, with the attention kernels that GPUs have; varlen's know no float32."""
    write_examples(files / "turns")
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "-m", "examples.mosaic_streaming.train"]
    runs = {}
    for flavor in PACKED:
        given = [*torchrun, *packed_run(files, flavor), "--training.mixed_precision_param=bfloat16"]
        ended = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        runs[flavor] = losses(ended.stdout + ended.stderr)
    alone = runs.pop("debugmodel")
    assert list(alone) == [1, 2, 3, 4]
    assert all(packed == pytest.approx(alone, abs=2e-2) for packed in runs.values())
