"""The surgery layer alone: look at a network's channel groups, write a plan by hand, apply it, prove it.

Run it with `python examples/prune_by_hand.py`; it needs no data and takes a second.
"""

from __future__ import annotations

import torch

import prunekit as pk


def main() -> None:
    """Remove every other channel of each layer inside the first stage of a ResNet-20."""
    model = pk.load("prunekit:resnet20")
    x = torch.zeros(1, 3, 32, 32)
    found = pk.inspect(model, x)
    print(f"{found.cost.params:,} parameters, {found.cost.macs:,} MACs, {len(found.groups)} channel groups")

    inner = [group for group in found.groups if group.name.startswith("layer1") and len(group.producers) == 1]
    plan = pk.Plan(pk.Keep(group.name, range(0, group.size, 2)) for group in inner)
    small = pk.apply(model, plan, x)

    after = pk.inspect(small, x)
    print(f"{after.cost.params:,} parameters, {after.cost.macs:,} MACs after the plan")
    print(f"masked and sliced outputs differ by at most {pk.verify(model, small, plan, x):.1e}")
    print("untouched:", ", ".join(f"{g.name} ({g.reason})" for g in found.groups if g.reason))


if __name__ == "__main__":
    main()
