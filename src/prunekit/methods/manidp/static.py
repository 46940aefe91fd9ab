"""Removal, for good, of channels that no image ever keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import surgery
from prunekit.errors import InputError, counted
from prunekit.methods.manidp.costs import channels_of
from prunekit.methods.manidp.record import Record
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.buckets import NAME, BucketTable
from prunekit.nn.gated import gated_layers
from prunekit.nn.norms import norms_of, table_of
from prunekit.plan import Keep, Plan
from prunekit.spec import origin_of, remember


def prune_static(view: GatedView, record: Record) -> tuple[nn.Module, Plan]:
    """Return a copy of the gated network without the channels that were off for every image of `record`, and the plan.

    Channels of streams stay: other layers add to them. Stored thresholds stay as they are; for the images of `record`
    the network computes what it did.

    Raises:
        InputError: every channel was kept by some image.
        SurgeryError: the result could not be proven.
    """
    model, graph = view.model, view.graph
    keeps = []
    for name, used in zip(view.layers, record.used, strict=True):
        group = channels_of(graph, name)
        if graph.is_stream(group) or group.size != len(used):
            continue
        kept = [unit for unit in range(group.size) if used[unit] or unit in group.frozen] or [0]
        if len(kept) < group.size:
            keeps.append(Keep(group.name, kept))
    if not keeps:
        raise InputError(
            f"each removable channel was kept by some of {counted(len(record.kept), 'image')}: none can go for good",
            hint="a smaller budget (prunekit manidp calibrate --target-macs) leaves more channels unused",
        )
    plan = Plan(keeps, example=graph.example_shapes)
    small = surgery.edit(model, plan, graph)
    surgery.verify(model, small, plan, graph)
    _narrow_tables(model, small, surgery.resolve(graph, plan).indices)
    origin = origin_of(small)
    if origin is not None:
        remember(small, origin.after({"method": "manidp prune-static", "plan": plan.to_json()}))
    return small, plan


@torch.no_grad()
def _narrow_tables(model: nn.Module, small: nn.Module, stays: Mapping[tuple[str, int], Any]) -> None:
    """Leave in the tables of `small`, **in place**, the columns of the channels that stay; `stays` tells which by
    parameter and dimension.

    No forward pass reads the tables, so that surgery knows nothing of them.
    """

    def columns(widths: Mapping[str, int]) -> Tensor:
        parts, first = [], 0
        for name, width in widths.items():
            kept = stays.get((name, 0))
            parts.append(first + (torch.arange(width) if kept is None else torch.from_numpy(kept)))
            first += width
        return torch.cat(parts)

    norms = table_of(small)
    if norms is not None:
        kept = columns({f"{name}.running_mean": norm.num_features for name, norm in norms_of(model)})
        norms.means, norms.variances = norms.means[:, kept], norms.variances[:, kept]
    buckets = getattr(small, NAME, None)
    if isinstance(buckets, BucketTable):
        widths = {f"{name}.gate.excite.bias": layer.gate.excite.out_features for name, layer in gated_layers(model)}
        buckets.scales = buckets.scales[:, columns(widths)]
