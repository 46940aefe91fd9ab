"""The surgery layer: read a network, group its channels, apply a plan, prove the result.

It operates and never decides: which channels go is a method's business.
"""

from prunekit.surgery.cost import Cost, LayerCost, cost_of, measure, predict
from prunekit.surgery.edit import edit
from prunekit.surgery.graph import Graph, resolve
from prunekit.surgery.groups import ChannelGroup, Member
from prunekit.surgery.narrow import balanced
from prunekit.surgery.parametrised import materialised
from prunekit.surgery.reparametrised import pruned
from prunekit.surgery.trace import trace
from prunekit.surgery.unwrap import check_types, plain_example, uncompiled, unwrapped
from prunekit.surgery.verify import verify

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
