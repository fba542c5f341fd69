"""The saved state as one string of JSON."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from examples.mosaic_streaming.checkpoint.fingerprint import START_ANEW, Fingerprint
from examples.mosaic_streaming.checkpoint.history import Segment
from examples.mosaic_streaming.checkpoint.progress import ConsumedCounts
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.sampling import Order

STATE_KEY = "mosaic"
STATE_VERSION = 2
COUNT_KEYS = ("samples", "tokens", "targets")
"""What the saved state calls the fields of `ConsumedCounts`."""

MAX_POSITION, MAX_COUNT = 1 << 40, 1 << 60
"""More epochs, or samples in one, than there ever are; and more tokens than a run ever reads."""


class State(NamedTuple):
    """What is saved; the fields are named as in the JSON."""

    epoch: int  # of the next sample
    sample_in_epoch: int  # samples of that epoch that have been read
    global_batch_size: int  # samples per optimizer step
    data: Fingerprint
    seen: ConsumedCounts | None  # since the run's first step or the streams' new beginning; None in older states
    steps: int  # optimizer steps since then; in a run that went on from an older state, since that one
    segments: tuple[Segment, ...]  # of these steps; each start that changes the global batch begins a new one

    @classmethod
    def at_beginning(cls, data: Fingerprint, global_batch_size: int) -> "State":
        """Return the state of a run that has read nothing."""
        return cls(0, 0, global_batch_size, data, None, 0, (Segment.at_beginning(global_batch_size),))


def pack(state: State) -> dict[str, str]:
    """Return the state under one key: DCP asks only for the keys of the fresh state, so it finds any version."""
    seen = state.seen and dict(zip(COUNT_KEYS, state.seen, strict=True))
    return {STATE_KEY: json.dumps({"version": STATE_VERSION, **state._asdict(), "seen": seen})}


def unpack(saved_state: Mapping[str, object]) -> State:
    """Return a saved state.

    Raises:
        DataError: it is damaged, or of a version that this code doesn't know.
    """
    text = str(saved_state.get(STATE_KEY))
    try:
        saved = json.loads(text)
        if (version := saved["version"]) != STATE_VERSION:
            raise DataError(
                f"The checkpoint's dataloader state is of version {version}, this code reads version {STATE_VERSION}. "
                f"Go on with the code that wrote it, or {START_ANEW}."
            )
        epoch, sample_in_epoch = (checked(saved[key]) for key in ("epoch", "sample_in_epoch"))
        global_batch_size = checked(saved["global_batch_size"], least=1)
        if not isinstance(data := saved["data"], dict):
            raise TypeError(data)
        steps, segments = read_segments(saved, Segment(0, epoch, sample_in_epoch, global_batch_size))
        return State(epoch, sample_in_epoch, global_batch_size, data, read_seen(saved.get("seen")), steps, segments)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged_state_error(text) from error


def read_seen(saved: Any) -> ConsumedCounts | None:
    """What had been read; loss tokens are null where nobody had counted them."""
    if saved is None:
        return None
    samples, tokens, loss_tokens = (saved[key] for key in COUNT_KEYS)
    loss_tokens = None if loss_tokens is None else checked(loss_tokens, MAX_COUNT)
    return ConsumedCounts(checked(samples, MAX_COUNT), checked(tokens, MAX_COUNT), loss_tokens)


def read_segments(saved: Any, here: Segment) -> tuple[int, tuple[Segment, ...]]:
    """The steps done and their segments; in an older state, which lacks them, the known history begins here."""
    if "segments" not in saved:
        return 0, (here,)
    segments = tuple(Segment(*map(checked, segment)) for segment in saved["segments"])
    steps, begins = checked(saved["steps"]), [segment.step for segment in segments]
    has_sizes = all(segment.global_batch_size for segment in segments)
    if begins[:1] != [0] or sorted({*begins}) != begins or begins[-1] > steps or not has_sizes:
        raise ValueError(segments)
    return steps, segments


def checked(value: Any, limit: int = MAX_POSITION, least: int = 0) -> int:
    """Return a whole number from `least` on and below a limit, or raise ValueError."""
    if type(value) is not int or not least <= value < limit:
        raise ValueError(value)
    return value


def damaged_state_error(state: str) -> DataError:
    """Return the error for a state that can't be right."""
    return DataError(
        f"The checkpoint's dataloader state is damaged: {state[:200]!r}. Load an earlier checkpoint with "
        f"--checkpoint.load_step, or {START_ANEW}."
    )


def check_position(state: State, epoch_size: int, order: Order) -> None:
    """Raise DataError if a position is beyond the end of an epoch of so many samples, in an order that has epochs."""
    if order.blend and state.epoch:
        raise damaged_state_error(f"epoch {state.epoch:,} of an order without epochs")
    if state.sample_in_epoch > epoch_size and not order.blend:
        raise damaged_state_error(f"{state.sample_in_epoch:,} samples read of an epoch of {epoch_size:,}")
