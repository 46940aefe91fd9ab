"""Network Slimming's L1 penalty on the scaling factors gamma of batch norms (Liu et al., ICCV 2017, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm

from prunekit import surgery
from prunekit.errors import TrainingError, unknown_name
from prunekit.training.optimizer import pull

_SMALL = 0.01  # share of the largest |gamma| up to which a gamma counts as sparse in reports


class GammaPenalty:
    """The gammas of a network, and two ways of driving them to zero: subgradient and proximal steps."""

    def __init__(self, gammas: dict[str, nn.Parameter]) -> None:
        self.gammas = list(gammas.values())

    @classmethod
    def of(cls, model: nn.Module, penalised: Sequence[str] | None, *, needed: bool) -> GammaPenalty:
        """Collect the gammas named by `penalised` (parameter names), or every trainable batch-norm weight.

        Raises:
            TrainingError: The penalty is `needed` and there is nothing to penalise.
        """
        if penalised is None:
            found = {
                f"{name}.weight": module.weight
                for name, module in model.named_modules()
                if isinstance(module, _BatchNorm) and module.affine and module.weight.requires_grad
            }
        else:
            known = dict(model.named_parameters())
            for name in penalised:
                if name not in known:
                    raise unknown_name("parameter to penalise", name, known)
            found = {name: known[name] for name in penalised if known[name].requires_grad}
        if needed and not found:
            raise TrainingError(
                "sparsity has nothing to penalise: the network has no trainable batch-norm weights",
                hint="train without --sparsity, or use a network with batch norm",
            )
        return cls(found)

    def __len__(self) -> int:
        """Return the number of gammas, one per channel."""
        return sum(gamma.numel() for gamma in self.gammas)

    def add_subgradient(self, strength: float) -> None:
        """Add `strength * sign(gamma)` to the gradients: once per optimiser step, after unscaling and clipping."""
        for gamma in self.gammas:
            if gamma.grad is not None:
                gamma.grad.add_(gamma.detach().sign(), alpha=strength)

    @torch.no_grad()
    def shrink(self, strength: float, optimizer: optim.Optimizer) -> None:
        """Take the proximal step, `gamma = sign(gamma) * max(|gamma| - t, 0)`: once after each optimiser step.

        The threshold `t` is how far the optimiser would carry the subgradient in the long run, so both forms of the
        penalty drive the same gammas to zero: those that the loss holds by a gradient of less than `strength`.
        """
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        for gamma in self.gammas:
            threshold = pull(optimizer, groups[gamma], gamma, strength)
            gamma.copy_(gamma.sign() * (gamma.abs() - threshold).clamp(min=0))

    @torch.no_grad()
    def share_small(self) -> float | None:
        """Return the share of gammas of at most 1 % of the largest; None where there are none."""
        if not self.gammas:
            return None
        sizes = torch.cat([gamma.detach().abs().flatten() for gamma in self.gammas])
        return float((sizes <= _SMALL * sizes.max()).float().mean())


def sparsity_penalty(model: nn.Module) -> Tensor:
    """Return the sum of |gamma| over the batch norms of a network: the term that Network Slimming adds to the loss.

    Equation 1 of Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017), without
    its weight lambda, which is yours to choose: they take 1e-4 or 1e-5.

    Args:
        model: The network, whose trainable batch-norm weights count.

    Returns:
        A scalar with a gradient; its gradient at a gamma of zero is zero.

    Raises:
        TrainingError: The network has no trainable batch-norm weights.

    Examples:
        >>> import torch, prunekit as pk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> loss = model(torch.rand(2, 3, 8, 8)).square().mean() + 1e-4 * pk.sparsity_penalty(model)
        >>> loss.backward()
        >>> pk.sparsity_penalty(model).item()
        8.0
    """
    gammas = GammaPenalty.of(model, None, needed=True).gammas
    return torch.stack([gamma.abs().sum() for gamma in gammas]).sum()


def inner_gammas(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Return the batch-norm weights of channels that can be removed alone, since no addition shares them with others.

    Where only these are to be pruned, a penalty on the others costs accuracy and saves nothing. `inputs` are
    those of one example, with a batch of one.
    """
    graph = surgery.trace(model, inputs)
    inner = [group for group in graph.groups if group.free and not graph.is_stream(group)]
    members = [member for group in inner for member in (*group.producers, *group.followers)]
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.affine}
    return sorted({m.parameter for m in members if m.module in norms and m.parameter.endswith(".weight")})
