"""Lets a run that a signal ends save a checkpoint first."""

from typing import Any

from torch.distributed.fsdp import FSDPModule

from examples.mosaic_streaming.distributed import AbortChannel


class WayOut:
    """What makes a Trainer stop after the same step on all ranks, with a checkpoint, when `channel` is told to."""

    channel: AbortChannel
    step: int
    checkpointer: Any
    model_parts: Any

    def should_continue_training(self) -> bool:
        """Whether another step follows. TorchTitan asks before each, once the one before is saved and validated."""
        goes_on: bool = super().should_continue_training()  # type: ignore[misc]  # a Trainer has it
        if goes_on and self.checkpointer.enable and not self.checkpointer.load_only:
            self.channel.begin_step(self.step + 1, self._save)
        return goes_on

    def _save(self) -> None:
        """Save the whole state, unless TorchTitan just has, and wait until that is finished.

        Source: TorchTitan saves a last step in the foreground, and whole where these settings are off (torchtitan
        0.2.2, components/checkpoint.py; 0.3.0, components/checkpointer/dcp.py). It never saves after validation, which
        leaves some parameters gathered (torch 2.15, distributed/fsdp).
        """
        saver, step = self.checkpointer, self.step
        if step % saver.interval and not (step == 1 and saver.enable_first_step_checkpoint):
            for module in (module for part in self.model_parts for module in part.modules()):
                if isinstance(module, FSDPModule):
                    module.reshard()
            saver.last_save_model_only = saver.last_save_in_hf = False
            saver.save(step, last_step=True)
        if saver.save_future:
            saver.save_future.result()
