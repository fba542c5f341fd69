"""The saved state: a position in the data, and the fingerprint of the data, in one string of JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from examples.mosaic_streaming.checkpoint.fingerprint import START_ANEW, Fingerprint
from examples.mosaic_streaming.checkpoint.history import Segment
from examples.mosaic_streaming.checkpoint.progress import ConsumedCounts
from examples.mosaic_streaming.errors import DataError

STATE_KEY = "mosaic"
STATE_VERSION = 2
MAX_POSITION = 1 << 40
"""More epochs, or samples in one, than there ever are."""
MAX_SEEN = 1 << 60
"""More tokens than a run ever reads."""


class State(NamedTuple):
    """What is saved.

    Attributes:
        epoch: that the next sample is of.
        sample_in_epoch: samples of it that have been read.
        global_batch_size: samples of an optimizer step.
        data: what decides which samples come next.
        seen: since the run's first step, or since the streams began anew; none in a state of before it was saved.
        steps: done since then; in a run that has gone on from a state of before this was saved, since that one.
        segments: of these steps; each start that changes the global batch begins one.
    """

    epoch: int
    sample_in_epoch: int
    global_batch_size: int
    data: Fingerprint
    seen: ConsumedCounts | None
    steps: int
    segments: tuple[Segment, ...]


def pack(state: State) -> dict[str, str]:
    """The state: one key, so that DCP, which asks for just the keys of the fresh state, finds it in any version."""
    seen = state.seen and state.seen._asdict()
    return {STATE_KEY: json.dumps({"version": STATE_VERSION, **state._asdict(), "seen": seen})}


def unpack(saved_state: Mapping[str, object]) -> State:
    """A saved state.

    Raises:
        DataError: it is damaged, or of a version that this code doesn't know.
    """
    text = str(saved_state.get(STATE_KEY))
    try:
        saved = json.loads(text)
        version = saved["version"]
        if version == STATE_VERSION:
            epoch, sample_in_epoch = (number(saved[key], MAX_POSITION) for key in ("epoch", "sample_in_epoch"))
            global_batch_size = number(saved["global_batch_size"], MAX_POSITION, least=1)
            data = saved["data"]
            if not isinstance(data, dict):
                raise TypeError(data)
            here = Segment(0, epoch, sample_in_epoch, global_batch_size)
            seen, steps, segments = read_seen(saved.get("seen")), *read_segments(saved, here)
            return State(epoch, sample_in_epoch, global_batch_size, data, seen, steps, segments)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(text) from error
    raise DataError(
        f"The checkpoint's dataloader state is of version {version}, this code reads version {STATE_VERSION}. "
        f"Go on with the code that wrote it, or {START_ANEW}."
    )


def read_seen(saved: Any) -> ConsumedCounts | None:
    """What has been read, as it is saved."""
    if saved is None:
        return None
    samples, tokens = (number(saved[key], MAX_SEEN) for key in ("samples", "tokens"))
    targets = saved["targets"]
    return ConsumedCounts(samples, tokens, None if targets is None else number(targets, MAX_SEEN))


def read_segments(saved: Any, here: Segment) -> tuple[int, tuple[Segment, ...]]:
    """The steps done and their segments, as they are saved; where they aren't, what is known begins here."""
    if "segments" not in saved:
        return 0, (here,)
    segments = tuple(Segment(*(number(value, MAX_POSITION) for value in segment)) for segment in saved["segments"])
    steps, begins = number(saved["steps"], MAX_POSITION), [segment.step for segment in segments]
    sizes = [segment.global_batch_size for segment in segments]
    if begins[:1] != [0] or sorted({*begins}) != begins or begins[-1] > steps or not all(sizes):
        raise ValueError(segments)
    return steps, segments


def number(value: Any, limit: int, least: int = 0) -> int:
    """A whole number below a limit, or ValueError."""
    if type(value) is not int or not least <= value < limit:
        raise ValueError(value)
    return value


def damaged(state: str) -> DataError:
    """What to say of a state that can't be right."""
    return DataError(
        f"The checkpoint's dataloader state is damaged: {state[:200]!r}. Load an earlier checkpoint with "
        f"--checkpoint.load_step, or {START_ANEW}."
    )


def check_position(state: State, epoch_size: int) -> None:
    """Raise DataError for a position beyond the end of an epoch of so many samples."""
    if state.sample_in_epoch > epoch_size:
        raise damaged(f"{state.sample_in_epoch:,} samples read of an epoch of {epoch_size:,}")


def explain_missing(error: str) -> str | None:
    """What to do about a checkpoint that lacks what training goes on from; none for any other error of DCP.

    Source: "Missing key in checkpoint state_dict" (torch 2.13, distributed/checkpoint/default_planner.py).
    """
    key = re.search(
        r"Missing key in checkpoint state_dict: ((dataloader|train_state|optimizer|lr_scheduler)\b.*)\.", error
    )
    if not key:
        return None
    by_other = "another loader: keep its model and optimizer and start the streams from their beginning with "
    by_other += "--checkpoint.exclude_from_loading=dataloader, for this one start"
    return (
        f"The checkpoint has no {key[1]!r}. Either it is model-only, as TorchTitan writes a run's last one unless "
        "checkpoint.last_save_model_only = false: for this one start, load an earlier one with --checkpoint.load_step "
        "or begin a new run with its weights: --checkpoint.initial_load_path=<this checkpoint> and a "
        "--checkpoint.folder that doesn't exist yet. "
        f"Or it was written by {by_other if key[2] == 'dataloader' else 'another version of torch or torchtitan'}."
    )
