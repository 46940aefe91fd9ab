"""The surgery layer: read a network, group its channels, apply a plan, prove the result.

It operates and never decides: which channels go is a method's business.

Public as `prunekit.surgery`: the steps that `apply` takes, one by one, for what has to look in between.

Examples:
    >>> import torch, prunekit as pk
    >>> model, x = pk.load("prunekit:resnet20"), torch.zeros(1, 3, 32, 32)
    >>> graph = pk.surgery.trace(model, x)
    >>> plan = pk.Plan([pk.Keep("layer1.0.conv1", range(8))])
    >>> small = pk.surgery.edit(model, plan, graph)
    >>> pk.surgery.verify(model, small, plan, graph) < 1e-5
    True
"""

from prunekit.surgery.cost import Cost, LayerCost, cost_of, measure, predict
from prunekit.surgery.editing.editor import edit
from prunekit.surgery.editing.parametrised import materialised
from prunekit.surgery.editing.reparametrised import pruned
from prunekit.surgery.graph.equal_shares import balanced
from prunekit.surgery.graph.graph import Graph
from prunekit.surgery.graph.groups import ChannelGroup, Member
from prunekit.surgery.graph.resolved import ResolvedPlan, resolve
from prunekit.surgery.proof.verification import verify
from prunekit.surgery.tracing.tracer import trace
from prunekit.surgery.unwrap import check_types, plain_example, uncompiled, unwrapped

__all__ = [
    "ChannelGroup",
    "Cost",
    "Graph",
    "LayerCost",
    "Member",
    "ResolvedPlan",
    "balanced",
    "check_types",
    "cost_of",
    "edit",
    "materialised",
    "measure",
    "plain_example",
    "predict",
    "pruned",
    "resolve",
    "trace",
    "uncompiled",
    "unwrapped",
    "verify",
]
