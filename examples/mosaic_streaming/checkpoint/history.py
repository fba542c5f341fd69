"""Which samples of which epoch a run reads in which step: from its beginning, over restarts, and on from there."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling import Order


class Position(NamedTuple):
    """Where in the data a run is: optimizer steps done, epoch, and samples of it that have been read."""

    step: int
    epoch: int
    sample_in_epoch: int


class Segment(NamedTuple):
    """Steps in a row, in global batches of one size: where they begin, and that size.

    Attributes:
        step: optimizer steps done before.
        epoch: that the first sample is of.
        sample_in_epoch: samples of it that have been read before.
        global_batch_size: samples of an optimizer step.
    """

    step: int
    epoch: int
    sample_in_epoch: int
    global_batch_size: int


def go_on(segments: tuple[Segment, ...], here: Segment) -> tuple[Segment, ...]:
    """Segments, and one that follows them, in place of those that have no step by then."""
    return (*(segment for segment in segments if segment.step < here.step), here)


class Slice(NamedTuple):
    """Samples in a row of an epoch, `begin` to `end`, that steps behind `step` read in global batches of one size."""

    step: int
    epoch: int
    begin: int
    end: int
    global_batch_size: int


@dataclass(frozen=True)
class History:
    """What a run has read and will read, as far as it is known.

    Attributes:
        order: of its streams, with the present global batch.
        segments: at least one, by their steps; what was before the first is not known. The last goes on for ever.
        samples_before: read before the first, of these streams; none where that isn't known either.
    """

    order: Order
    segments: tuple[Segment, ...]
    samples_before: int | None = 0

    @property
    def begins_anew(self) -> bool:
        """Whether its first segment begins where the streams do."""
        return self.segments[0][1:3] == (0, 0)

    def segment(self, step: int) -> Segment:
        """That of a step, counted from 1.

        Raises:
            ConfigError: the step is not known.
        """
        if step <= self.segments[0].step:
            why = (
                "the streams began anew there (checkpoint.exclude_from_loading)"
                if self.begins_anew
                else "the checkpoint, of an earlier version of this code, doesn't say in which batches"
            )
            raise ConfigError(
                f"Step {step} was read before step {self.segments[0].step + 1}, and {why}. Look it up with an earlier "
                "checkpoint of the run (--checkpoint)."
            )
        return [segment for segment in self.segments if segment.step < step][-1]

    def position(self, step: int) -> Position:
        """Where the next batch is after a number of steps, none of which is before the first that is known."""
        return self._walk([segment for segment in self.segments if segment.step <= step][-1], step)

    def batch(self, step: int) -> Slice:
        """The samples of a step, counted from 1.

        Raises:
            ConfigError: the step is not known.
        """
        segment = self.segment(step)
        _, epoch, begin = self._walk(segment, step - 1)
        return Slice(step - 1, epoch, begin, begin + segment.global_batch_size, segment.global_batch_size)

    def slices(self, after: int | None = None, until: int | None = None) -> Iterator[Slice]:
        """What is read, an epoch or a part of one at a time.

        Args:
            after: steps that are left out; without, those that are not known.
            until: the last step; without, it goes on for ever.
        """
        for segment, following in itertools.pairwise([*self.segments, None]):
            assert segment is not None
            ends = [step for step in (until, following and following.step) if step is not None]
            step = max(segment.step, segment.step if after is None else after)
            while not ends or step < min(ends):
                _, epoch, begin = self._walk(segment, step)
                batch = segment.global_batch_size
                steps = min([self.remaining(begin, batch) // batch, *(end - step for end in ends)])
                yield Slice(step, epoch, begin, begin + steps * batch, batch)
                step += steps

    def samples(self, until: int) -> int | None:
        """Samples read up to a step, of these streams; none where that isn't known."""
        known = sum(part.end - part.begin for part in self.slices(until=until))
        return None if self.samples_before is None else self.samples_before + known

    def remaining(self, sample_in_epoch: int, global_batch_size: int) -> int:
        """Samples of an epoch that follow a position, in whole global batches of a size."""
        return dataclasses.replace(self.order, global_batch_size=global_batch_size).remaining(sample_in_epoch)

    def _walk(self, segment: Segment, step: int) -> Position:
        """Where the next batch is after a number of steps, of which the last are all of one segment."""
        batch, steps = segment.global_batch_size, step - segment.step
        first = self.remaining(segment.sample_in_epoch, batch) // batch
        if steps < first:
            return Position(step, segment.epoch, segment.sample_in_epoch + steps * batch)
        epochs, rest = divmod(steps - first, self.remaining(0, batch) // batch)
        return Position(step, segment.epoch + 1 + epochs, rest * batch)
