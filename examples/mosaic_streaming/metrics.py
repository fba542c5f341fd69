"""Adds where in the data a run is to TorchTitan's metrics."""

from typing import Any

from torchtitan.components.metrics import MetricsProcessor

from examples.mosaic_streaming.checkpoint import Progress
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.sampling import passes_text
from examples.mosaic_streaming.upstream.log_line import line_ends_in


class MosaicMetrics(MetricsProcessor):
    """A metrics processor that also logs what the loader has read."""

    loader: MosaicDataLoader  # of the run's training

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step; the arguments are TorchTitan's.

        `progress` is a collective, which is safe here: all ranks log the same steps (torchtitan 0.2.2, train.py).
        """
        progress = self.loader.progress()
        metrics = (extra_metrics or {}) | data_metrics(progress)
        with line_ends_in(self, log_text(progress)):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=metrics)


def add_data_metrics(processor: MetricsProcessor, loader: MosaicDataLoader) -> MetricsProcessor:
    """Change a metrics processor, of any class, so that it also logs what a loader has read."""
    kind = type(processor)
    processor.__class__ = type(f"Mosaic{kind.__name__}", (MosaicMetrics, kind), {})
    processor.loader = loader
    return processor


def data_metrics(progress: Progress) -> dict[str, Any]:
    """The metrics for TensorBoard and W&B."""
    seen, fetched = progress.seen, progress.fetched
    place: dict[str, Any] = {"data/epoch": progress.epoch, "data/epoch_progress": progress.epoch_share}
    if progress.passes is not None:
        place = {f"data/passes/{name}": times for name, times in progress.passes.items()}
    return place | {
        "data/stage": progress.stage,
        "data/skipped_batches": progress.skipped_batches,
        "data/samples_seen": seen.samples,
        "data/tokens_seen": seen.tokens,
        "data/targets_seen": seen.loss_tokens,
        "data/padding(%)": 100 * progress.padding,
        "data/shards_fetched": fetched.shards,
        "data/bytes_fetched": fetched.bytes,
        "data/retries": fetched.retries,
        "data/cache_in_use(GiB)": progress.cache / 2**30,
    }


def log_text(progress: Progress) -> str:
    """The end of a log line, which has padding and fetches only where there are any."""
    place = f"epoch: {progress.epoch} ({progress.epoch_share:.1%})"
    if progress.passes is not None:
        place = f"passes: {passes_text(progress.passes)}"
    parts = [place, f"samples: {progress.seen.samples:,}", f"tokens: {progress.seen.tokens:,}"]
    if progress.padding:
        parts.append(f"padding: {progress.padding:.1%}")
    if any(progress.fetched):
        parts.append(f"fetched: {progress.fetched}")
    return "  ".join(parts)
