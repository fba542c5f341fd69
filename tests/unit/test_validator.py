"""Validation: its loss against a computation without any of our code, in each layout; the same samples each round."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.metrics import MetricsProcessor

from examples.mosaic_streaming.titan.validator import MeanOverTokens
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses, train, write_files
from tests.support.ranks import Rank, run_rank_values, run_ranks
from tests.support.reading import write_turns
from tests.support.recording import recorded, recording
from tests.support.streams import SEQ_LEN, sample_tokens, write_stream
from tests.support.titan import IS_0_2, llama3

SAMPLES = 45
"""Of the validation stream: of 2 ranks with batches of 8, the last batch has 13 samples of 16."""
FIRST = 200
VALIDATE = ("--validation.enable", "--validation.freq=1", f"--validation.seq_len={SEQ_LEN}")
FROZEN = ("--optimizer.lr=0", "--training.steps=2", "--lr_scheduler.warmup_steps=0")

LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "one rank": (1, 8, []),
    "FSDP 2": (2, 8, ["--training.local_batch_size=2"]),
    "FSDP 2, small batches": (2, 2, ["--training.local_batch_size=2"]),
    "TP 2": (2, 8, ["--parallelism.tensor_parallel_degree=2"]),
    "PP 2": (2, 4, ["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=2"]),
    "PP 2 x FSDP 2": (4, 2, ["--training.local_batch_size=2", "--parallelism.pipeline_parallel_degree=2"]),
}
"""Ranks, sequences of a validation batch per dp rank, and flags."""
LONG = [pytest.mark.long, pytest.mark.both]


@pytest.fixture(scope="module")
def seeded(module_path: Path) -> Path:
    """A folder with files, validation streams and a seed checkpoint."""
    folder = write_files(module_path)
    write_stream(folder / "held_out", SAMPLES, first=FIRST)
    write_validation(folder, "text", folder / "held_out")
    train(folder, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=seed")
    return folder


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each rank print its validation losses with all digits."""
    log = MetricsProcessor.log_validation

    def print_and_log(self: MetricsProcessor, loss: float, step: int, **more: object) -> None:
        print(f"validated step {step}: {loss!r}")
        log(self, loss, step)

    monkeypatch.setattr(MetricsProcessor, "log_validation", print_and_log)


def write_validation(folder: Path, name: str, stream: Path, num_workers: int = 0) -> None:
    """Write `validation.toml`."""
    (folder / "validation.toml").write_text(
        f'name = "{name}"\nnum_workers = {num_workers}\n[dataset]\nlocal = "{stream}"\nremote = "{stream}"\n'
    )


def arguments(folder: Path, *flags: str) -> list[str]:
    """The arguments of `train.main`, with validation."""
    seed = f"--checkpoint.initial_load_path={folder}/outputs/seed/step-0"
    given = command(folder, "--checkpoint.enable", "--checkpoint.interval=1000", seed, *VALIDATE, *flags)
    return ["--mosaic-validation-config", f"{folder}/validation.toml", *given]


def validate(folder: Path, name: str, *flags: str, world_size: int = 1) -> list[Rank]:
    """Run in ranks that all have to succeed."""
    given = arguments(folder, *flags, f"--checkpoint.folder={name}")
    ranks = run_ranks(lambda: main(given), world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, "\n".join(rank.output for rank in ranks)
    return ranks


def validated(rank: Rank) -> list[float]:
    """The validation losses that a rank knows, in their order."""
    return [float(loss) for loss in re.findall(r"validated step \d+: (\S+)", rank.output)]


def reference(folder: Path, samples: range, prompt: int = 0) -> float:
    """The mean loss of the seed's model over samples, each on its own.

    Args:
        folder: with the seed.
        samples: their numbers.
        prompt: tokens of each that are no targets.
    """

    def compute() -> float:
        model = llama3(SEQ_LEN)
        state = model.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/outputs/seed/step-0", no_dist=True)
        model.load_state_dict(state)
        total, count = 0.0, 0
        for sample in samples:
            tokens = torch.tensor(sample_tokens(sample).astype("int64"))
            with torch.no_grad():
                logits: Any = model(tokens[None, :-1])[0].double()
            chosen = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[max(0, prompt - 1) :]
            total, count = total - chosen.sum().item(), count + len(chosen)
        return total / count

    [found] = run_rank_values(compute)
    return found


@pytest.fixture(scope="module")
def whole(seeded: Path) -> float:
    """The mean loss over the whole stream."""
    return reference(seeded, range(FIRST, FIRST + SAMPLES))


@pytest.mark.parametrize(
    "layout",
    [
        "one rank",
        *(
            pytest.param(layout, marks=[pytest.mark.long, pytest.mark.both])
            for layout in LAYOUTS
            if layout != "one rank"
        ),
    ],
)
def test_a_whole_pass_has_the_mean_loss_of_all_samples(seeded: Path, whole: float, layout: str) -> None:
    world_size, local, flags = LAYOUTS[layout]
    flags = [*FROZEN, *flags, f"--validation.local_batch_size={local}", "--validation.steps=-1"]
    for rank in validate(seeded, re.sub(r"\W", "_", layout), *flags, world_size=world_size):
        first, second = validated(rank)
        assert first == second
        assert abs(first - whole) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_round_reads_the_first_samples_and_training_goes_on_as_without(seeded: Path, num_workers: int) -> None:
    write_validation(seeded, "text", seeded / "held_out", num_workers)
    flags = ("--training.steps=6", "--training.local_batch_size=2")
    with recording(seeded / f"with_{num_workers}"):
        some = ("--validation.steps=3", "--validation.local_batch_size=4")
        ranks = validate(seeded, f"few_{num_workers}", *flags, *some, world_size=2)
    with recording(seeded / f"without_{num_workers}"):
        seed = f"--checkpoint.initial_load_path={seeded}/outputs/seed/step-0"
        plain = train(seeded, "--checkpoint.enable", seed, f"--checkpoint.folder=plain_{num_workers}", *flags,
                      world_size=2)  # fmt: skip
    assert recorded(seeded / f"with_{num_workers}") == recorded(seeded / f"without_{num_workers}")
    assert losses(ranks[0].output) == losses(plain[0].output)
    assert len(validated(ranks[0])) == 6, "at step 1 and then each step"
    assert all(rank.left == [] for rank in ranks)
    frozen = validate(seeded, f"frozen_{num_workers}", *FROZEN, *some, world_size=2)
    first, second = validated(frozen[0])
    assert first == second
    assert abs(first - reference(seeded, range(FIRST, FIRST + 24))) < 1e-5


@pytest.mark.parametrize(("samples", "world_size"), [(1, 2), pytest.param(3, 4, marks=pytest.mark.long)])
def test_ranks_without_a_sample_take_part(seeded: Path, samples: int, world_size: int) -> None:
    """In batches of 2."""
    write_stream(seeded / f"few_{samples}", samples, first=FIRST)
    write_validation(seeded, "text", seeded / f"few_{samples}", num_workers=2)
    ranks = validate(
        seeded, f"uneven_{world_size}", *FROZEN, "--training.local_batch_size=1", "--validation.local_batch_size=2",
        world_size=world_size,
    )  # fmt: skip
    few = reference(seeded, range(FIRST, FIRST + samples))
    assert all(abs(loss - few) < 1e-5 for rank in ranks for loss in validated(rank))
    write_validation(seeded, "text", seeded / "held_out")


def test_only_responses_count(seeded: Path) -> None:
    write_turns(seeded / "turns", 21)
    write_validation(seeded, "finetuning", seeded / "turns")
    [rank] = validate(seeded, "turns_1", *FROZEN, "--validation.local_batch_size=4")
    expected = reference(seeded, range(21), prompt=4)
    assert all(abs(loss - expected) < 1e-5 for loss in validated(rank))
    write_validation(seeded, "text", seeded / "held_out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"--validation.seq_len={2 * SEQ_LEN}"], f"validation.seq_len = {2 * SEQ_LEN}, but the model is made for"),
        (["--validation.local_batch_size=0"], "validation.local_batch_size = 0, expected at least 1"),
        (
            ["--parallelism.pipeline_parallel_degree=2", "--validation.local_batch_size=3"],
            "validation.local_batch_size = 3, but the stages of a pipeline take batches of one shape, and "
            "training.local_batch_size = 2. Set it to that.",
        ),
    ],
)
def test_rounds_that_the_model_cant_take_are_refused(seeded: Path, flags: list[str], message: str) -> None:
    first, second = run_ranks(lambda: main(arguments(seeded, *flags, "--checkpoint.folder=refused")), 2)
    assert first.code == 1 and second.code != 0
    assert (first.output + second.output).count(f"ConfigError: {message}") == 1
    assert "Building llama3" not in first.output, "told before the model is built"


def test_rounds_of_no_batch_are_refused_in_one_line(seeded: Path) -> None:
    [rank] = run_ranks(lambda: main(arguments(seeded, "--validation.steps=0")))
    assert rank.code == 1
    flag = "--job.config_file=" if IS_0_2 else ""
    assert f"ConfigError: TorchTitan refuses {flag}{seeded}/job.toml: validation " in rank.output
    assert "Traceback" not in rank.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("packing_ratio = 2", "packing leaves samples out, and a validation round reads each once"),
        ('batching_method = "stratified"', "A validation round has an order of its own"),
    ],
)
def test_settings_that_leave_samples_out_are_refused(seeded: Path, extra: str, message: str) -> None:
    file = seeded / "validation.toml"
    before = file.read_text()
    file.write_text(before.replace('"text"', '"finetuning"') + extra + "\n")
    [rank] = run_ranks(lambda: main(arguments(seeded, "--checkpoint.folder=left_out")))
    file.write_text(before)
    assert rank.code == 1
    assert rank.output.count(message) == 1


def test_cache_of_another_stream_is_not_taken(seeded: Path) -> None:
    """Copied from the training loader, with another `remote`, but the same `local`."""
    loader, validation = seeded / "loader.toml", seeded / "validation.toml"
    before = loader.read_text(), validation.read_text()
    loader.write_text(f'name = "text"\n[dataset]\nremote = "{seeded}/stream"\nlocal = "{seeded}/cache"\n')
    validation.write_text(f'name = "text"\n[dataset]\nremote = "{seeded}/held_out"\nlocal = "{seeded}/cache"\n')
    [rank] = run_ranks(lambda: main(arguments(seeded, "--checkpoint.folder=cache")))
    loader.write_text(before[0])
    validation.write_text(before[1])
    assert rank.code == 1
    assert f"{seeded}/cache, but another `remote`. Give each its own." in rank.output


def test_validation_on_streams_of_training_is_warned_of_however_they_are_written(seeded: Path) -> None:
    (seeded / "link").symlink_to("stream")
    write_validation(seeded, "text", seeded / "link")
    [rank] = validate(seeded, "same", *FROZEN)
    write_validation(seeded, "text", seeded / "held_out")
    assert f"Training reads the same as validation: {seeded}/stream. The loss will tell less." in rank.output


def test_samples_of_another_length_are_told_as_in_training(seeded: Path) -> None:
    write_stream(seeded / "short", 20, length=SEQ_LEN, first=FIRST)
    write_validation(seeded, "text", seeded / "short")
    [rank] = run_ranks(lambda: main(arguments(seeded, "--checkpoint.folder=short")))
    write_validation(seeded, "text", seeded / "held_out")
    assert rank.code == 1
    told = f"{SEQ_LEN} tokens, but rows of validation.seq_len = {SEQ_LEN} take {SEQ_LEN + 1} (dataset.max_seq_len)."
    assert told in rank.output and f"Set dataset.max_seq_len = {SEQ_LEN} in {seeded}/validation.toml" in rank.output


@pytest.mark.both
@pytest.mark.long
def test_tokens_of_validation_move_no_expert(seeded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek V3, with the one function that TorchTitan 0.2.2 needs and torch 2.15 lacks on a CPU."""

    def histc(tokens: torch.Tensor, bins: int, **bounds: int) -> torch.Tensor:
        return torch.bincount(tokens.reshape(-1), minlength=bins)

    monkeypatch.setattr(torch, "histc", histc)
    deepseek = ("--model.name=deepseek_v3_mosaic", "--debug.seed=1", "--training.steps=5")
    given = command(seeded, *deepseek, *VALIDATE, "--validation.local_batch_size=4")
    [rank] = run_ranks(lambda: main(["--mosaic-validation-config", f"{seeded}/validation.toml", *given]))
    assert rank.code == 0, rank.output
    assert len(validated(rank)) == 5
    assert losses(rank.output) == losses(train(seeded, *deepseek)[0].output)


def test_worker_of_validation_that_is_killed_stops_the_job_with_its_exit_code(
    seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = MeanOverTokens.validate

    def validate_and_kill(self: MeanOverTokens, *given: Any) -> None:
        validate(self, *given)
        self.loader._batches._workers[0].kill()  # type: ignore[union-attr]

    monkeypatch.setattr(MeanOverTokens, "validate", validate_and_kill)
    write_validation(seeded, "text", seeded / "held_out", num_workers=1)
    [rank] = run_ranks(lambda: main(arguments(seeded, "--training.steps=50", "--checkpoint.folder=killed")))
    write_validation(seeded, "text", seeded / "held_out")
    assert rank.code == 1
    assert re.search(r"DataError: Dataloader worker 0 \(pid \d+\) ended with exit code -9\.", rank.output), rank.output
    assert f"in {seeded}/validation.toml." in rank.output
    assert rank.left == []
