"""Which samples a run reads in which step: from its beginning, over restarts, stages and skips, and from there on."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from examples.mosaic_streaming.checkpoint.fingerprint import Fingerprint, stream_keys, streams_in
from examples.mosaic_streaming.config import Plan
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling import ENDLESS, Order, Reading


class Segment(NamedTuple):
    """Consecutive global batches of one size, in one stage."""

    batch: int  # global batches that were read or skipped before
    epoch: int  # of the first sample
    sample_in_epoch: int  # samples of that epoch that were read or skipped before
    global_batch_size: int  # samples per optimizer step


class Slice(NamedTuple):
    """Samples `begin` to `end` of an epoch of a stage, which the steps after `step` read in batches of one size."""

    step: int
    batch: int  # global batches read or skipped before
    stage: int  # counted from 0
    epoch: int
    begin: int
    end: int
    global_batch_size: int


class Position(NamedTuple):
    """Where in the data a run is: optimizer steps done, and samples of a stage's epoch that have been read."""

    step: int
    stage: int  # counted from 0
    epoch: int
    sample_in_epoch: int


def append_segment(segments: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """Return segments with a new one at the end, without those that have no batch before it."""
    return (*(segment for segment in segments if segment.batch < new.batch), new)


@dataclass(frozen=True)
class History:
    """What a run has read and will read, as far as it is known.

    Steps are those of the run. The batches and steps of the plan are counted from where the streams began.
    """

    plan: Plan
    orders: tuple[Order, ...]  # of the stages, with the present global batch
    segments: tuple[Segment, ...]  # at least one, by their batches; nothing is known of before, and the last has no end
    samples_before: int | None = 0  # of these streams that were read before the first segment; None if unknown
    steps_before: int = 0  # of the run, when the streams began

    @classmethod
    def of(
        cls,
        plan: Plan,
        orders: Sequence[Order],
        fingerprints: Sequence[Fingerprint],
        segments: tuple[Segment, ...] = (),
        begun: int = 1,
    ) -> "History":
        """Make the history of a plan, in which each stream goes on where earlier stages leave it.

        The orders are those of each stage for itself, and the segments, if any are known, those of the stages begun.
        """
        segments = segments or (Segment(0, 0, 0, orders[0].global_batch_size),)
        for begin, order in [*zip(plan.begins, orders, strict=True)][begun:]:
            segments = append_segment(segments, Segment(begin, 0, 0, order.global_batch_size))
        alone = cls(plan, tuple(orders), segments)
        return dataclasses.replace(alone, orders=tuple(alone._going_on(fingerprints)))

    @property
    def first_step(self) -> int:
        """Steps of the run before those that are known."""
        return self.steps_before + self.plan.steps(self.segments[0].batch)

    @property
    def begins_anew(self) -> bool:
        """Whether the first segment begins where the streams do."""
        return self.segments[0][1:3] == (0, 0)

    def batch(self, step: int) -> int:
        """Return the number of the batch that a step reads."""
        return self.plan.batch(step - self.steps_before)

    def segment(self, step: int) -> Segment:
        """Return the segment of a step, counted from 1; ConfigError if the step is before those that are known."""
        if step <= self.first_step:
            why = "the checkpoint, of an earlier version of this code, doesn't say in which batches"
            if self.begins_anew:
                why = "the streams began anew there (checkpoint.exclude_from_loading)"
            raise ConfigError(
                f"Step {step} was read before step {self.first_step + 1}, and {why}. Look it up with an earlier "
                "checkpoint of the run (--checkpoint)."
            )
        return self._segment(self.batch(step) - 1)[0]

    def slice(self, step: int) -> Slice:
        """Return the samples of a step, counted from 1; ConfigError as in `segment`."""
        self.segment(step)
        return next(self.slices(step - 1, step))

    def position(self, step: int) -> Position:
        """Return where a run is after so many steps, directly behind the batch of the last one."""
        batch = max(self.batch(step), self.segments[0].batch)
        stage = self._stage(batch - 1)
        segment = [one for one in self.segments_until(stage) if one.batch <= batch][-1]
        return Position(step, stage, *self._walk(segment, batch - segment.batch))

    def report(self) -> list[dict[str, int]]:
        """Return the segments for people: with the steps before each, and its stage, counted from 1."""
        return [
            {"step": self.steps_before + self.plan.steps(segment.batch), "stage": self._stage(segment.batch) + 1}
            | segment._asdict()
            for segment in self.segments
        ]

    def segments_until(self, stage: int) -> tuple[Segment, ...]:
        """Return the segments up to the end of a stage."""
        return tuple(segment for segment in self.segments if self._stage(segment.batch) <= stage)

    def slices(self, after: int | None = None, until: int | None = None) -> Iterator[Slice]:
        """Yield what is read after a step up to another, at most an epoch at a time; by default all that is known."""
        begin = self.segments[0].batch if after is None else max(self.batch(after), self.segments[0].batch)
        for first, last in self.plan.runs(begin, ENDLESS if until is None else self.batch(until)):
            yield from self._slices(first, last)

    def samples(self, until: int) -> int | None:
        """Return the samples of these streams that are read up to a step; None if unknown."""
        return None if self.samples_before is None else self.samples_before + self.samples_between(None, until)

    def samples_between(self, after: int | None, until: int) -> int:
        """Return the samples that are read after a step, or from the first known one on, up to another."""
        return sum(piece.end - piece.begin for piece in self.slices(after, until))

    def remaining(self, stage: int, sample_in_epoch: int, global_batch_size: int) -> int:
        """Return the samples of an epoch that follow a position, in whole global batches of a size."""
        return dataclasses.replace(self.orders[stage], global_batch_size=global_batch_size).remaining(sample_in_epoch)

    def steps_left(self, step: int) -> int:
        """Return how many steps of a stage follow after a step; the last stage has no end."""
        ends = [stage.from_step - 1 + self.steps_before for stage in self.plan.stages[1:]]
        return next((end - step for end in ends if end > step), ENDLESS)

    def order(self, step: int) -> tuple[int, Order]:
        """Return the stage that the next step reads, and its order from there to its end, without what is skipped."""
        now = next(self.slices(step))
        skipped = [
            (one.epoch, one.begin, one.end)
            for skip in self.plan.skips
            for one in self._slices(max(skip.first - 1, now.batch), skip.last)
            if one.stage == now.stage
        ]
        end = self._end(now.stage) if now.stage + 1 < len(self.orders) else None
        order = dataclasses.replace(self.orders[now.stage], first_epoch=now.epoch, first_sample=now.begin)
        return now.stage, dataclasses.replace(order, skipped=tuple(skipped), end=end)

    def _slices(self, batch: int, end: int) -> Iterator[Slice]:
        """Yield the samples of consecutive batches, given the numbers before the first one and of the last one."""
        while batch < end:
            segment, stop = self._segment(batch)
            stage, (epoch, begin), size = self._stage(batch), self._walk(segment, batch - segment.batch), segment[3]
            count = min(self.remaining(stage, begin, size) // size, min(stop, end) - batch)
            step = self.steps_before + self.plan.steps(batch)
            yield Slice(step, batch, stage, epoch, begin, begin + count * size, size)
            batch += count

    def _segment(self, batch: int) -> tuple[Segment, int]:
        """Return the segment in which the batch behind so many others is, and the batches before the next segment."""
        number = bisect.bisect_right([segment.batch for segment in self.segments], batch)
        stop = self.segments[number].batch if number < len(self.segments) else ENDLESS
        return self.segments[number - 1], stop

    def _stage(self, batch: int) -> int:
        """Return the stage in which the batch behind so many others is."""
        return max(0, bisect.bisect_right(self.plan.begins, batch) - 1)

    def _end(self, stage: int) -> tuple[int, int]:
        """Return where a stage ends that isn't the last: epoch, and sample in it."""
        return self.position(self.steps_before + self.plan.stages[stage + 1].from_step - 1)[2:]

    def _walk(self, segment: Segment, batches: int) -> tuple[int, int]:
        """Epoch and sample in it of the next batch, some batches after the beginning of a segment."""
        stage, size = self._stage(segment.batch), segment.global_batch_size
        first = self.remaining(stage, segment.sample_in_epoch, size) // size
        if batches < first:
            return segment.epoch, segment.sample_in_epoch + batches * size
        epochs, rest = divmod(batches - first, self.remaining(stage, 0, size) // size)
        return segment.epoch + 1 + epochs, rest * size

    def _going_on(self, fingerprints: Sequence[Fingerprint]) -> Iterator[Order]:
        """Let each stream of a stage go on where earlier stages leave it."""
        read: dict[int, Reading] = {}
        stages = zip(self.plan.stages, self.orders, stream_keys(fingerprints), strict=True)
        for number, (stage, order, keys) in enumerate(stages):
            if not order.blend:  # no stream has a position in it
                yield order
                continue
            for key, (_, name) in zip(keys, streams_in(fingerprints[number]), strict=True):
                if name in stage.restart:
                    read.pop(key, None)
            blend = order.blend.going_on([(key, read.get(key)) for key in keys])
            yield dataclasses.replace(order, blend=blend)
            if number + 1 < len(self.orders):
                counts = enumerate(blend.counts(self._end(number)[1]).tolist())
                read |= {keys[place]: Reading(blend, place, count) for place, count in counts if count}
