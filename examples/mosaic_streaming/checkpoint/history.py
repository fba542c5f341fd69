"""Which samples of which epoch a run reads in which step: from its beginning, over restarts, and from there on."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling import Order


class Segment(NamedTuple):
    """Consecutive optimizer steps with one global batch size."""

    step: int  # optimizer steps done before
    epoch: int  # of the first sample
    sample_in_epoch: int  # samples of that epoch that have been read before
    global_batch_size: int  # samples per optimizer step

    @classmethod
    def at_beginning(cls, global_batch_size: int) -> "Segment":
        """Return the segment of a run that has read nothing."""
        return cls(0, 0, 0, global_batch_size)


class Slice(NamedTuple):
    """Samples `begin` to `end` of an epoch, which the steps after `step` read in global batches of one size."""

    step: int
    epoch: int
    begin: int
    end: int
    global_batch_size: int


class Position(NamedTuple):
    """Where in the data a run is: optimizer steps done, epoch, and samples of it that have been read."""

    step: int
    epoch: int
    sample_in_epoch: int


def append_segment(segments: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """Return segments with a new one at the end, without those that have no step before it."""
    return (*(segment for segment in segments if segment.step < new.step), new)


@dataclass(frozen=True)
class History:
    """What a run has read and will read, as far as it is known."""

    order: Order  # of its streams, with the present global batch
    segments: tuple[Segment, ...]  # at least one, by their steps; nothing is known of before, and the last has no end
    samples_before: int | None = 0  # of these streams that were read before the first segment; None if unknown

    @property
    def begins_anew(self) -> bool:
        """Whether the first segment begins where the streams do."""
        return self.segments[0][1:3] == (0, 0)

    def segment(self, step: int) -> Segment:
        """Return the segment of a step, counted from 1; ConfigError if the step is before those that are known."""
        if step <= self.segments[0].step:
            why = "the checkpoint, of an earlier version of this code, doesn't say in which batches"
            if self.begins_anew:
                why = "the streams began anew there (checkpoint.exclude_from_loading)"
            raise ConfigError(
                f"Step {step} was read before step {self.segments[0].step + 1}, and {why}. Look it up with an earlier "
                "checkpoint of the run (--checkpoint)."
            )
        return [segment for segment in self.segments if segment.step < step][-1]

    def batch(self, step: int) -> Slice:
        """Return the samples of a step, counted from 1; ConfigError as in `segment`."""
        self.segment(step)
        return next(self.slices(step - 1, step))

    def position(self, step: int) -> Position:
        """Return where the next batch begins after so many steps, which are not before the first segment."""
        return Position(*next(self.slices(step))[:3])

    def slices(self, after: int | None = None, until: int | None = None) -> Iterator[Slice]:
        """Yield what is read after a step up to another, at most an epoch at a time; by default all that is known."""
        following = [segment.step for segment in self.segments[1:]]
        for segment, end in zip(self.segments, [*following, None], strict=True):
            batch, ends = segment.global_batch_size, [step for step in (end, until) if step is not None]
            step = segment.step if after is None else max(segment.step, after)
            while not ends or step < min(ends):
                epoch, begin = self._walk(segment, step - segment.step)
                steps = min([self.remaining(begin, batch) // batch, *(end - step for end in ends)])
                yield Slice(step, epoch, begin, begin + steps * batch, batch)
                step += steps

    def samples(self, until: int) -> int | None:
        """Return the samples of these streams that are read up to a step; None if unknown."""
        ends = [*(segment.step for segment in self.segments[1:]), until]
        steps = [max(0, min(end, until) - one.step) for one, end in zip(self.segments, ends, strict=True)]
        known = sum(count * one.global_batch_size for one, count in zip(self.segments, steps, strict=True))
        return None if self.samples_before is None else self.samples_before + known

    def remaining(self, sample_in_epoch: int, global_batch_size: int) -> int:
        """Return the samples of an epoch that follow a position, in whole global batches of a size."""
        return dataclasses.replace(self.order, global_batch_size=global_batch_size).remaining(sample_in_epoch)

    def _walk(self, segment: Segment, steps: int) -> tuple[int, int]:
        """Epoch and sample in it of the next batch, some steps after the beginning of a segment."""
        batch = segment.global_batch_size
        first = self.remaining(segment.sample_in_epoch, batch) // batch
        if steps < first:
            return segment.epoch, segment.sample_in_epoch + steps * batch
        epochs, rest = divmod(steps - first, self.remaining(0, batch) // batch)
        return segment.epoch + 1 + epochs, rest * batch
