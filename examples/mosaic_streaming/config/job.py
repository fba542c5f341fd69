"""What this project knows of a training job. `titan/` makes it from TorchTitan's job config."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.mosaic_streaming.sampling import Layout


@dataclass(frozen=True)
class BatchShape:
    """The batches that a model takes."""

    section: str  # of the job config that says so, for messages
    local_batch_size: int  # sequences per dp rank and micro-batch
    seq_len: int  # tokens per sequence


@dataclass(frozen=True)
class Validation:
    """How a job validates."""

    shape: BatchShape
    steps: int  # batches of all ranks in a round; -1 for all that there are
    freq: int  # optimizer steps from round to round


@dataclass(frozen=True)
class Checkpoints:
    """How a job saves and loads checkpoints."""

    enable: bool
    folder: str  # with a folder `step-N` for each
    load_step: int  # -1 for the last
    exclude_from_loading: tuple[str, ...]  # states that a start doesn't load: "dataloader", "train_state" and others
    last_save_model_only: bool  # so that no run can go on from the last one

    @property
    def counts_anew(self) -> bool:
        """Whether a start counts the steps of the run, or its streams, from their beginning again."""
        return bool({"dataloader", "train_state"} & {*self.exclude_from_loading})


@dataclass(frozen=True)
class Job:
    """A training job."""

    model: str  # name of its Mosaic form
    flavor: str
    vocab_size: int  # rows of the model's embedding
    assets: str  # folder of the tokenizer's assets
    documents: bool  # whether the flavor keeps attention within documents
    positions: bool  # whether the model can be given positions
    masks_by_positions: bool  # whether the model makes its masks of positions, and so needs them in each batch
    document_flavors: tuple[str, ...]  # the model's flavors that keep attention within documents
    layout: "Layout"
    training: BatchShape
    global_batch_size: int  # sequences per optimizer step
    microbatches: int  # parts in which the trainer takes a batch from the loader: those of a pipeline, or 1
    steps: int  # optimizer steps of the whole run
    collective_timeout: float  # seconds that ranks wait for each other in a training step
    validation: Validation | None
    checkpoints: Checkpoints
