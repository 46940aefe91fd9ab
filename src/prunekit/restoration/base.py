"""The interface of a restoration: a way to make up for what a plan removes.

In essence it turns a plan into a plan. What goes is decided before, by a method or by hand, and stands in the plan; a
restoration adds `Fold`s and `Refit`s and never changes what is removed. Neuron Merging's folds are such an answer too:
they need to know which filters stay, and that is what the plan says; everything else is in the original weights. Two
things flow the other way, for methods that ask before they decide: which groups can be made up for (`obstacle`), and
what is known of the data (`evidence`), on which `merge` measures the losses by which it chooses filters and widths.

It is found through the entry points `prunekit.restorations`, and can then be named by every method, on the command line
and in `restore`. Its module must import without torch (import it inside `restore`), so that commands start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunekit.plan import Plan
    from prunekit.restoration.images import Images, Inputs
    from prunekit.surgery import ChannelGroup, Graph


@dataclass(frozen=True)
class Evidence:
    """What is known of the data that a network reads.

    Attributes:
        model: The network as it is to see the images: itself, or with batch-norm statistics that suit images that were
            made.
        images: Unlabelled, normalised images `(N, C, H, W)`, given or made, of the network's type and on its device;
            None where there are none.

    Examples:
        >>> import torch, prunekit as pk
        >>> pk.Evidence(torch.nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 8, 8)).images.shape
        torch.Size([2, 3, 8, 8])
    """

    model: nn.Module
    images: Tensor | Inputs | None


class Restoration(ABC):
    """A way of restoring. One with settings is a dataclass: their values are its fields, all with defaults.

    A field that has the name of a setting of the method, such as `seed`, takes its value from there.

    Attributes:
        name: What `--restore` and `restore` call it.
        summary: One line for `prunekit methods`.
        needs_images: Whether it can do nothing without images.

    Examples:
        The next layer goes on reading what a removed channel was on average over the images:

        >>> import torch, prunekit as pk
        >>> class Means(pk.Restoration):
        ...     name, summary, needs_images = "means", "Fold in the means of what goes.", True
        ...     def restore(self, model, graph, plan, evidence):
        ...         means = model[0](evidence.images).mean(0).detach()
        ...         means[list(plan.keeps[0].index)] = 0  # these stay
        ...         return pk.Plan([*plan, pk.Fold("1", "0", offset=means)], plan.notes)
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.rand(64, 4)
        >>> plan = pk.restore(model, pk.Plan([pk.Keep("0", range(4))]), x, images=x, way=Means())
        >>> torch.allclose(pk.apply(model, plan, x)(x).mean(0), model(x).mean(0), atol=1e-6)
        True
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_images: ClassVar[bool] = False

    def obstacle(self, model: nn.Module, graph: Graph, group: ChannelGroup) -> str | None:
        """Return why what goes from a channel group cannot be made up for; None where it can, or may be.

        `merge` narrows no group that has an obstacle, unless it is told to.
        """
        del model, graph, group
        return None

    def evidence(self, model: nn.Module, graph: Graph, images: Images | None) -> Evidence:
        """Return what is known of the data: by default the images that were given.

        Raises:
            InputError: Images that do not suit the network.
        """
        from prunekit.restoration.images import gather

        return Evidence(model, None if images is None else gather(images, model, graph))

    @abstractmethod
    def restore(self, model: nn.Module, graph: Graph, plan: Plan, evidence: Evidence) -> Plan:
        """Return `plan` with folds and refits that make up for its removals; `model` stays unchanged.

        Args:
            model: The network.
            graph: The graph that `trace` read from it.
            plan: What is removed, perhaps with folds and refits already. What it keeps and gates must stay as it is.
            evidence: What `evidence` has returned.

        Raises:
            InputError: It cannot be done with this network or these images.
        """
