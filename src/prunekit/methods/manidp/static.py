"""Removal, for good, of channels that no image ever keeps."""

from __future__ import annotations

from torch import nn

from prunekit import surgery
from prunekit.errors import InputError, counted
from prunekit.methods.manidp.costs import channels_of
from prunekit.methods.manidp.record import Record
from prunekit.methods.manidp.view import GatedView
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
    origin = origin_of(small)
    if origin is not None:
        remember(small, origin.after({"method": "manidp prune-static", "plan": plan.to_json()}))
    return small, plan
