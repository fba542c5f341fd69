"""The saved state as one string of JSON, and how it is read without a job."""

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from examples.mosaic_streaming.checkpoint.fingerprint import (
    START_ANEW,
    Fingerprint,
    digest,
    streams_in,
    without_name,
)
from examples.mosaic_streaming.checkpoint.history import History, Segment, append_segment
from examples.mosaic_streaming.checkpoint.progress import ConsumedCounts
from examples.mosaic_streaming.config import Plan, Skip
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling import Order
from examples.mosaic_streaming.upstream.missing_keys import explain_missing

FLAG = "--mosaic-position"  # names the folder whose position is read
STATE_KEY = "mosaic"
STATE_VERSION, PLAN_VERSION = 2, 3
"""Of a state, and of one that has stages behind it or skips, which earlier versions of this code don't know."""
COUNT_KEYS = ("samples", "tokens", "targets")  # what the saved state calls the fields of `ConsumedCounts`
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
    segments: tuple[Segment, ...]  # of these steps; each stage, and each start that changes the global batch, has one
    past: tuple[tuple[int, Fingerprint], ...] = ()  # of each stage that has ended: batches before its end, and its data
    skipped: tuple[tuple[int, int], ...] = ()  # batches that were left out before this position
    ahead: tuple[str, ...] = ()  # the stages and skips that were to follow

    @classmethod
    def of(cls, history: History, steps: int, fingerprints: list[Fingerprint], seen: ConsumedCounts | None) -> "State":
        """Return the state of a run after so many steps; the fingerprints are those of its stages."""
        plan, (_, stage, epoch, sample) = history.plan, history.position(steps)
        segments = history.segments_until(stage)
        past = tuple((plan.begins[number + 1], fingerprints[number]) for number in range(stage))
        skipped = tuple(skip[:2] for skip in plan.skips if skip.first <= plan.batch(steps))
        size, ahead = segments[-1].global_batch_size, plan_ahead(plan, steps, fingerprints)
        return cls(epoch, sample, size, fingerprints[stage], seen, steps, segments, past, skipped, ahead)

    def history(
        self, plan: Plan, orders: Sequence[Order], fingerprints: Sequence[Fingerprint], goes_on: bool = True
    ) -> History:
        """Return the history of the run, which goes on with a plan; or only up to here, with the global batch it had.

        ConfigError if the global batch changes, and batches are to be skipped that its size would give other samples.
        """
        done, size = len(self.past), orders[len(self.past)].global_batch_size
        segments, batch = self.segments, self.read.batch(self.steps)
        if goes_on and size != self.global_batch_size:
            if ahead := [skip for skip in plan.skips if skip.first > batch]:
                raise ConfigError(
                    f"The global batch changes from {self.global_batch_size} to {size} samples, so that the numbers of "
                    f"batches in the skip of {ahead[0]} in {plan.source} would mean other samples. Restore "
                    "training.global_batch_size, or remove the skip, and look its numbers up again after this start."
                )
            at_end = not orders[done].remaining(self.sample_in_epoch)
            place = (self.epoch + 1, 0) if at_end else (self.epoch, self.sample_in_epoch)
            segments = append_segment(segments, Segment(batch, *place, size))
        return History.of(plan, orders, fingerprints, segments, done + 1)

    @property
    def read(self) -> Plan:
        """The plan so far, of which only the skips are known."""
        return Plan((), tuple(Skip(*skip) for skip in self.skipped))

    @property
    def stages(self) -> list[Fingerprint]:
        """The data of each stage that has begun."""
        return [*(data for _, data in self.past), self.data]


def plan_ahead(plan: Plan, steps: int, fingerprints: Sequence[Fingerprint]) -> tuple[str, ...]:
    """Name the stages and skips that follow after a number of steps; other data of a stage gives another name."""
    stages = [
        f"stage from step {stage.from_step:,}, batch {begin + 1:,}: {', '.join(name for _, name in streams_in(data))} "
        f"({digest([without_name(value) for value in data.values()])[:4]})"
        for stage, begin, data in zip(plan.stages, plan.begins, fingerprints, strict=True)
        if stage.from_step > max(steps, 1)
    ]
    return (*stages, *(f"skip of {skip}" for skip in plan.skips if skip.first > plan.batch(steps)))


def pack(state: State) -> dict[str, str]:
    """Return the state under one key: DCP asks only for the keys of the fresh state, so it finds any version."""
    seen = state.seen and dict(zip(COUNT_KEYS, state.seen, strict=True))
    version = PLAN_VERSION if state.past or state.skipped else STATE_VERSION
    content = state._asdict() | {"seen": seen}
    kept = {key: value for key, value in content.items() if value or key not in ("past", "skipped", "ahead")}
    return {STATE_KEY: json.dumps({"version": version} | kept)}


def unpack(saved_state: Mapping[str, object]) -> State:
    """Return a saved state; DataError if it is damaged, or of a version that this code doesn't know."""
    text = str(saved_state.get(STATE_KEY))
    try:
        saved = json.loads(text)
        if (version := saved["version"]) not in (STATE_VERSION, PLAN_VERSION):
            raise DataError(
                f"The checkpoint's dataloader state is of version {version}, this code reads versions {STATE_VERSION} "
                f"and {PLAN_VERSION}. Go on with the code that wrote it, or {START_ANEW}."
            )
        epoch, sample_in_epoch = (checked(saved[key]) for key in ("epoch", "sample_in_epoch"))
        global_batch_size = checked(saved["global_batch_size"], least=1)
        if not isinstance(data := saved["data"], dict):
            raise TypeError(data)
        seen = read_seen(saved.get("seen"))
        skipped = tuple((checked(first), checked(last)) for first, last in saved.get("skipped", ()))
        past = tuple((checked(end), dict(of_stage)) for end, of_stage in saved.get("past", ()))
        state = State(epoch, sample_in_epoch, global_batch_size, data, seen, 0, (), past, skipped)
        steps, segments = read_segments(saved, Segment(0, epoch, sample_in_epoch, global_batch_size), state.read)
        return state._replace(steps=steps, segments=segments, ahead=tuple(map(str, saved.get("ahead", ()))))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged_state_error(text) from error


def read_seen(saved: Any) -> ConsumedCounts | None:
    """What had been read; loss tokens are null where nobody had counted them."""
    if saved is None:
        return None
    samples, tokens, loss_tokens = (saved[key] for key in COUNT_KEYS)
    loss_tokens = None if loss_tokens is None else checked(loss_tokens, MAX_COUNT)
    return ConsumedCounts(checked(samples, MAX_COUNT), checked(tokens, MAX_COUNT), loss_tokens)


def read_segments(saved: Any, here: Segment, read: Plan) -> tuple[int, tuple[Segment, ...]]:
    """The steps done and their segments; in an older state, which lacks them, the known history begins here."""
    if "segments" not in saved:
        return 0, (here,)
    segments = tuple(Segment(*map(checked, segment)) for segment in saved["segments"])
    steps, begins = checked(saved["steps"]), [segment.batch for segment in segments]
    has_sizes = all(segment.global_batch_size for segment in segments)
    if begins[:1] != [0] or sorted({*begins}) != begins or begins[-1] > read.batch(steps) or not has_sizes:
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


def read_checkpoint(folder: str, content: dict[str, Any], flag: str) -> None:
    """Fill in states, by their keys and of the right types, from a step's folder; ConfigError if one can't be read."""
    logging.disable(logging.WARNING)  # torch logs the traceback of what is one line here
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no process group
            dcp.load(content, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        [root_cause, *_] = [cause for cause, _ in error.failures.values()]
        words = [type(root_cause).__name__, *str(root_cause).strip().splitlines()[:1]]
        reason = f"it can't be read: {': '.join(words)}. Name an earlier one."
        raise ConfigError(f"{flag} {folder}: {explain_missing(str(error)) or reason}") from error
    finally:
        logging.disable(logging.NOTSET)


def read_position(folder: str) -> dict[str, str]:
    """The state of the loader in a step's folder, as a run has it that begins there.

    ConfigError if there is no such checkpoint, or no such state in it; DataError if the state is damaged.
    """
    if not os.path.isfile(os.path.join(folder, ".metadata")):
        raise ConfigError(f"{FLAG} {folder} is no finished checkpoint. Expected a step's folder, such as step-500.")
    content = {"dataloader": {STATE_KEY: ""}}
    read_checkpoint(folder, content, FLAG)
    return pack(unpack(content["dataloader"]))
