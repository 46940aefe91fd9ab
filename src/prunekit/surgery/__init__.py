"""The surgery layer: read a network, group its channels, apply a plan, prove the result.

It operates and never decides: which channels go is a method's business.
"""

from prunekit.surgery.cost import Cost, LayerCost, cost_of, measure, predict
from prunekit.surgery.editing.editor import edit
from prunekit.surgery.editing.parametrised import materialised
from prunekit.surgery.editing.reparametrised import pruned
from prunekit.surgery.graph.equal_shares import balanced
from prunekit.surgery.graph.graph import Graph, resolve
from prunekit.surgery.graph.groups import ChannelGroup, Member
from prunekit.surgery.proof.verification import verify
from prunekit.surgery.tracing.tracer import trace
from prunekit.surgery.unwrap import check_types, plain_example, uncompiled, unwrapped

__all__ = [
    "ChannelGroup",
    "Cost",
    "Graph",
    "LayerCost",
    "Member",
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
