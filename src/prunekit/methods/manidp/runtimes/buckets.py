"""The `buckets` runtime: K static sub-networks, cut by the surgery layer, and a router that sends each image to one.

Images that keep similar channels share a sub-network, which the manifold regulariser makes possible (similar images
have similar saliencies). A bucket's saliencies are the means of its images; its layers keep as many channels as these
do on average. An approximation: its accuracy is to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit import surgery
from prunekit.devices import CPU, device_of, forked_generators, seed_generators
from prunekit.errors import InputError
from prunekit.methods.manidp.costs import graph_of
from prunekit.methods.manidp.record import observe
from prunekit.methods.manidp.view import GatedView
from prunekit.nn.buckets import NAME, BucketTable, Router
from prunekit.nn.gated import gated_layers, remove_gates
from prunekit.nn.norms import drop_norms
from prunekit.plan import Keep, Plan
from prunekit.progress import counter
from prunekit.surgery import Graph
from prunekit.surgery.copying import copied
from prunekit.surgery.editing.batch_norm_folding import fold_batch_norms

_ROUNDS = 25  # of k-means
_STEPS, _BATCH, _LR = 600, 128, 3e-3  # of the router's training


def add_buckets(view: GatedView, images: Tensor, count: int, *, seed: int = 0) -> float:
    """Find `count` buckets for a gated network, in eval mode, from `images` `(N, C, H, W)`, and store their table in
    it **in place**; returns the share of these images that the router sends to the bucket they belong to.

    Raises:
        InputError: fewer than two buckets, or too few images for them.
    """
    if count < 2 or len(images) < 20 * count:
        raise InputError(
            f"{count} sub-networks from {len(images)} images", hint="two or more, and at least twenty images for each"
        )
    device = device_of(view.model)
    record = observe(view, ((part, None) for part in torch.split(images, 250)), saliencies=True)
    kept = [layer.kept(pi.to(device)).cpu() for layer, pi in zip(view.layers.values(), record.saliencies, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    home = k_means(torch.cat([(pi > 0).float() for pi in kept], 1), count, generator)
    table = BucketTable(count, sum(view.cost.channels), images.size(1))
    for bucket in range(count):
        table.scales[bucket] = torch.cat([_constant(pi[home == bucket]) for pi in kept])
    right = train_router(table.router, images.cpu(), home, generator)
    view.model.add_module(NAME, table.to(next(view.model.parameters())).eval())
    return right


def bucketed(model: nn.Module) -> Bucketed:
    """Return the sub-networks and the router of a gated `model` that has a table; each is a plain, smaller network.

    Raises:
        InputError: it has none.
    """
    table = getattr(model, NAME, None)
    if not isinstance(table, BucketTable):
        raise InputError(
            "this network has no static sub-networks", hint="prunekit manidp calibrate --buckets 4 stores some"
        )
    layers = dict(gated_layers(model))
    widths = [layer.gate.excite.out_features for layer in layers.values()]
    parts = [dict(zip(layers, torch.split(scales, widths), strict=True)) for scales in table.scales]
    graph = graph_of(_static(model, parts[0]))  # of all of them: they differ in nothing but the scales
    networks, macs = zip(*[_cut(_static(model, scales), graph, scales) for scales in parts], strict=True)
    return Bucketed(copied(table.router), networks, macs).eval()


class Bucketed(nn.Module):
    """Network that runs each image through the sub-network its router chooses, a batch a bucket; `macs` are theirs."""

    def __init__(self, router: nn.Module, networks: Iterable[nn.Module], macs: Iterable[int] = ()) -> None:
        super().__init__()
        self.macs = tuple(macs)
        self.router = router
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answers: `(N, C, H, W)` -> `(N, classes)`."""
        routes = self.router(x).argmax(1)
        if len(x) == 1:
            alone: Tensor = self.networks[int(routes)](x)
            return alone
        output: Tensor | None = None
        for number in routes.unique().tolist():
            index = (routes == number).nonzero().flatten()
            part = self.networks[number](x.index_select(0, index))
            output = part.new_empty(len(x), *part.shape[1:]) if output is None else output
            output.index_copy_(0, index, part)
        assert output is not None
        return output


def _constant(kept: Tensor) -> Tensor:
    """Return constant saliencies `(c,)` for images that keep `(n, c)`: means, of as many channels as they keep."""
    if not len(kept):
        return torch.zeros(kept.size(1))
    means = kept.mean(0)
    count = max(1, round(float((kept > 0).sum(1).float().mean())))
    return torch.where(means >= means.topk(count).values[-1], means, torch.zeros_like(means))


def _static(model: nn.Module, scales: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy with constant saliencies, by layer, in place of the gates."""
    subject = copied(model)
    delattr(subject, NAME)
    drop_norms(subject)
    return remove_gates(subject, scales)


def _cut(model: nn.Module, graph: Graph, scales: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
    """Return the sub-network with these constant saliencies, sliced, verified and folded, and its MACs."""
    plan = Plan(_keeps(graph, scales), example=graph.example_shapes)
    small = surgery.edit(model, plan, graph)
    surgery.verify(model, small, plan, graph)
    folded, _ = fold_batch_norms(small, graph_of(small))
    return folded, surgery.predict(graph, surgery.resolve(graph, plan).kept).macs


def _keeps(graph: Graph, scales: Mapping[str, Tensor]) -> list[Keep]:
    """Return removals of the channels that are zero, in the layers whose channels nobody else adds to."""
    keeps = []
    for name, scale in scales.items():
        group = next((g for g in graph.groups if name in {m.module for m in (*g.producers, *g.followers)}), None)
        if group is None or graph.is_stream(group) or group.size != len(scale):
            continue
        kept = [unit for unit in range(group.size) if scale[unit] > 0 or unit in group.frozen]
        if kept and len(kept) < group.size:
            keeps.append(Keep(group.name, kept))
    return keeps


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the cluster of each of `(N, d)` points, `(N,)`; k-means++ starts (Arthur & Vassilvitskii, 2007)."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        distance = torch.cdist(points, centres).min(1).values.square()
        chance = distance + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(chance, 1, generator=generator)]])
    for _ in range(_ROUNDS):
        home = torch.cdist(points, centres).argmin(1)
        centres = torch.stack(
            [points[home == k].mean(0) if bool((home == k).any()) else centres[k] for k in range(count)]
        )
    return torch.cdist(points, centres).argmin(1)


def train_router(router: Router, images: Tensor, home: Tensor, generator: torch.Generator) -> float:
    """Teach the router, in place, the bucket of each image; return the share that it then gets right."""
    with forked_generators(CPU), torch.enable_grad():
        seed_generators(CPU, generator.initial_seed())
        for module in router.children():
            module.reset_parameters()  # type: ignore[operator]
        optimizer = torch.optim.Adam(router.parameters(), lr=_LR)
        count = counter("training the router")
        for done in range(_STEPS):
            count(done, _STEPS)
            batch = torch.randint(len(images), (min(_BATCH, len(images)),), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(router(images[batch]), home[batch])
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        right = torch.cat([router(part).argmax(1) for part in torch.split(images, 250)]) == home
    return float(right.float().mean())
