"""Double precision without wider copies of the weights."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from networks import random_network
from prunekit import surgery
from prunekit.errors import SurgeryError
from prunekit.plan import Keep, Plan
from prunekit.surgery.proof.precision import InDouble


@pytest.mark.parametrize("seed", range(8))
def test_as_a_network_of_doubles_computes(seed: int) -> None:
    model, x = random_network(seed).float(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with InDouble():
            found = model(x)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        torch.testing.assert_close(found, model.double()(x.double()), rtol=1e-12, atol=1e-12)


class Recurrent(nn.Module):
    """Its layer looks at the type of its weights, so that it needs wider copies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.rnn = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.relu(self.conv(x)))
        return self.rnn(y.flatten(2).transpose(1, 2))[0]


@pytest.mark.parametrize("network", [Recurrent, lambda: random_network(3).float()])
def test_judged_in_double_where_in_doubt(network: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(1, 3, 8, 8)
    graph = surgery.trace(model, x)
    group = next(g for g in graph.groups if len(g.free) > 2)
    plan = Plan([Keep(group.name, [u for u in range(group.size) if u != group.free[0]])])
    small = surgery.edit(model, plan, graph)
    asked: list[torch.dtype] = []
    module = sys.modules["prunekit.surgery.proof.comparison"]
    genuine = module._gap

    def doubtful(want: Tensor, have: Tensor, scale: float) -> float:
        asked.append(want.dtype)
        return 1.0 if want.dtype == torch.float32 else genuine(want, have, scale)

    monkeypatch.setattr(module, "_gap", doubtful)
    assert surgery.verify(model, small, plan, graph) < 1e-10
    assert set(asked) == {torch.float32, torch.float64}
    with torch.no_grad():
        next(p for p in small.parameters() if p.dim() > 1)[0] += 0.1
    with pytest.raises(SurgeryError, match="does not compute what was meant"):
        surgery.verify(model, small, plan, graph)
