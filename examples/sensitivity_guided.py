"""Prune each layer by what it can spare: sensitivity first, then a ratio for each group by hand.

Run it with `python examples/sensitivity_guided.py`; it uses the bundled digits and takes less than a minute.
"""

from __future__ import annotations

import torch

import prunekit as pk

ALLOWED = 0.02  # the accuracy that pruning one group alone may cost


def main() -> None:
    """Compare ratios that follow the sensitivities with one ratio for all, at about the same cost."""
    torch.manual_seed(0)
    data, validation, test = (pk.open_data("digits", part) for part in ("train", "val", "test"))
    model = pk.models.build("vgg_digits", {"gamma": 0.5})
    pk.train(model, pk.TrainConfig(epochs=10, batch_size=64, weight_decay=5e-3), data, validation)
    whole = pk.evaluate(model, test)
    print(f"whole: {whole.accuracy:.2%}, {whole.macs:,} MACs")

    ratios = (0.25, 0.5, 0.75)
    chosen = {}
    for group in pk.sensitivity(model, pk.inspect(model).graph, validation, ratios):
        spare = [r for r, left in zip(ratios, group.accuracy, strict=True) if left >= whole.accuracy - ALLOWED]
        found = [f"-{r:.0%} {left:.2%}" for r, left in zip(ratios, group.accuracy, strict=True)]
        print(f"{group.group:>12}: " + ", ".join(found))
        if spare:
            chosen[group.group] = max(spare)

    guided, _ = pk.merge(model, ratio=chosen or 0.25)
    measured = pk.evaluate(guided, test)
    print(f"by sensitivity: {measured.accuracy:.2%}, {measured.macs:,} MACs")
    even = pk.evaluate(pk.prune("merge", model, target_macs=measured.macs).model, test)
    print(f"evenly: {even.accuracy:.2%}, {even.macs:,} MACs")


if __name__ == "__main__":
    main()
