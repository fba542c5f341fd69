"""Experts count their tokens in evaluation, too, in buffers of one name."""

import inspect
import re

import torch
from torch import Tensor, nn

from examples.mosaic_streaming.upstream.expert_counts import BUFFER, kept_expert_counts
from tests.support.titan import only_0_2, only_0_3


@only_0_3
def test_experts_of_torchtitan_0_3_count_in_training_alone() -> None:
    from torchtitan.models.common.moe import MoE

    counts = re.search(
        r"if self\.training:\n +with torch\.no_grad\(\):\n +self\.\w+\.add_\(", inspect.getsource(MoE.forward)
    )
    assert counts, "TorchTitan 0.3 counts in evaluation: its validator has to use upstream/expert_counts.py"


@only_0_2
def test_torchtitans_experts_count_in_a_buffer_of_this_name_whatever_the_mode() -> None:
    from torchtitan.models.moe.moe import MoE, MoEArgs

    moe = MoE(MoEArgs(num_experts=2), dim=8, hidden_dim=8)
    assert BUFFER in dict(moe.named_buffers()), "TorchTitan counts elsewhere: see upstream/expert_counts.py"
    source = inspect.getsource(MoE.forward)
    assert f"self.{BUFFER}.add_(" in source, "TorchTitan counts in another way: see upstream/expert_counts.py"
    assert "self.training" not in source, "TorchTitan counts in training alone: upstream/expert_counts.py can go"


class Expert(nn.Module):
    """Counts as TorchTitan's do; theirs need a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(BUFFER, torch.tensor([3.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer(BUFFER).add_(x.numel())
        return x


@torch.no_grad()
def test_counts_are_afterwards_what_they_were() -> None:
    parts: list[nn.Module] = [nn.Sequential(Expert(), Expert()), nn.Linear(2, 2)]
    with kept_expert_counts(parts):
        parts[0](torch.ones(5))
        assert [float(buffer) for buffer in parts[0].buffers()] == [8.0, 8.0]
    assert [float(buffer) for buffer in parts[0].buffers()] == [3.0, 3.0]
