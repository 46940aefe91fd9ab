"""LeNet-300-100: the fully connected network of LeCun et al. (Proc. IEEE 1998)."""

from __future__ import annotations

from torch import Tensor, nn

from prunekit.models.common import scaled


class LeNet300100(nn.Module):
    """LeNet-300-100: `(N, C, 28, 28)` or flat -> `(N, num_classes)`; layers `ip1` to `ip3` as in Neuron Merging."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        self.ip1 = nn.Linear(in_channels * 28 * 28, first)
        self.relu1 = nn.ReLU()
        self.ip2 = nn.Linear(first, second)
        self.relu2 = nn.ReLU()
        self.ip3 = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores, `(N, num_classes)`."""
        x = self.relu1(self.ip1(x.flatten(1)))
        scores: Tensor = self.ip3(self.relu2(self.ip2(x)))
        return scores
