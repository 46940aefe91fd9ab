"""Sequential kernel least squares: refit a pruned network, layer by layer, to what the original computed.

Two copies see the same unlabelled images. Wherever removal has changed what a layer reads, the layer is refitted so
that from the *pruned* copy's input it gives the *original* copy's output: all kernel taps and input channels at once,
by ridge regression shrunk towards the present weights, with the ridge that suits images that were put aside; the
constant goes into its bias, or into the running mean of the batch norm behind it. A layer that adds into a residual
stream is asked to repair the stream as well. One forward pass of each copy does it all: both stop at each layer, and
the pruned one's is refitted when its input has arrived.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import nn

from prunekit.errors import counted
from prunekit.nn.attention import free_all
from prunekit.plan import Plan
from prunekit.restoration.branch_means import branch_means
from prunekit.restoration.frontier import Frontier
from prunekit.restoration.images import Images, Inputs, gather
from prunekit.restoration.layerwise_refit import refit_in_order
from prunekit.restoration.memory import MEMORY, read_memory
from prunekit.restoration.refit_targets import find_sites
from prunekit.surgery import Graph, edit, resolve
from prunekit.surgery.copying import copied

ROWS = 24_000  # positions of each layer, over all images: no more was gained from three times as many


def calibrate(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    images: Images | Inputs,
    *,
    ridge: float | None = None,
    rows: int = ROWS,
    memory: str | int = MEMORY,
    seed: int = 0,
    layers: Container[str] | None = None,
) -> Plan:
    """Return `plan` with refits for the layers whose inputs it changes; they start from its removals and folds.

    `images` are normalised, `(N, C, H, W)` or batches of them; labels are never asked for. They pass in batches, which
    wait for one another at each layer and there hold up to `memory`, bytes or a size such as `2GiB`; what is more waits
    in a file (`prunekit.restoration.frontier`), in the folder for temporary files. Besides, for one layer at a time, up
    to `rows` vectors of its input and output are held, and the square of its fan-in, or of `rows` if that is smaller.
    Of residual blocks that go, what their branches gave on average stays.
    With `layers` no others are refitted. `notes["calibration"]` tells the number of images and of refitted layers, and
    which were left, and why. The same images, seed, machine and number of threads give the same bits.

    Raises:
        InputError: images that do not suit the network, or none, or more than the disk has room for.
    """
    with torch.no_grad():
        batch = gather(images, model, graph)
        plan = Plan([*plan, *branch_means(model, graph, plan, batch, read_memory(memory))], plan.notes, plan.example)
        sites, left = find_sites(model, graph, plan)
        sites = [site for site in sites if layers is None or site.layer in layers]
        small = edit(model, plan, graph)
        original = copied(model).eval()
        for network in (original, small):  # as they were traced
            free_all(network)
        skipped = resolve(graph, plan).skipped
        frontier = Frontier(original, small.eval(), graph, sites, batch, read_memory(memory), skipped)
        found = refit_in_order(frontier, small, sites, rows=rows, ridge=ridge, seed=seed)
    done = {refit.layer for refit in found.refits}
    left |= {s.layer: found.failed.get(s.layer, "its forward is not called") for s in sites if s.layer not in done}
    notes = {"images": len(batch), "layers": len(sites) - len(left.keys() & {s.layer for s in sites}), "left": left}
    warning = _too_few(model, found.rows, len(batch))
    said = {"calibration": notes, **({"warning": warning} if warning else {})}
    return Plan([*plan.operations, *found.refits], {**plan.notes, **said}, plan.example)


def _too_few(model: nn.Module, rows: Mapping[str, int], images: int) -> str | None:
    """Return a warning where layers have more inputs than there are positions to learn from."""
    inputs = {name: model.get_parameter(f"{name}.weight" if name else "weight")[0].numel() for name in rows}
    starved = sorted((name for name in rows if rows[name] < inputs[name]), key=lambda name: rows[name] - inputs[name])
    if not starved:
        return None
    worst = starved[0]
    return (
        f"{counted(images, 'image')} gave {rows[worst]:,} positions of '{worst}', fewer than its {inputs[worst]:,} "
        f"inputs ({len(starved)} of {len(rows)} layers are so): what they do not tell stays as it was; more images help"
    )
