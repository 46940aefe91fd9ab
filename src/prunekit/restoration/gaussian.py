"""Second moments behind batch norm and an activation, in closed form from the weights alone.

A norm's output is taken for Gaussian: channel `i` is `N(beta_i, gamma_i^2)`. How two channels that a layer in front of
it makes go together follows from their filters, once something is assumed of what these read: here inputs that are
independent between channels, and that fade as `a^distance` between pixels. Behind an activation `f`, with `h_n` the
normalised Hermite coefficients of `u -> f(gamma u + beta)`, the mean is `h_0` and the covariance
`sum_{n>=1} h_n(i) h_n(j) rho^n` (Mehler's formula). Where a layer reads what a norm hands on, its inputs are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FADING = 0.5  # of neighbouring pixels' correlation; 0.1 and 0.3 did worse on held-out training images
_TERMS = 8
_GRID = torch.linspace(-7, 7, 561, dtype=torch.float64)
_DENSITY = torch.exp(-_GRID.square() / 2) / math.sqrt(2 * math.pi) * (_GRID[1] - _GRID[0])


def hermite(gamma: Tensor, beta: Tensor, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return `h_0 ... h_8`, `(9, C)`, and the variance, `(C,)`, of `activation(gamma u + beta)`, `u ~ N(0, 1)`."""
    values = activation(gamma[:, None] * _GRID + beta[:, None]) * _DENSITY  # (C, grid)
    before, now, found = torch.zeros_like(_GRID), torch.ones_like(_GRID), []
    for n in range(_TERMS + 1):
        found.append(values @ now)
        before, now = now, (_GRID * now - math.sqrt(n) * before) / math.sqrt(n + 1)
    second = activation(gamma[:, None] * _GRID + beta[:, None]).square() @ _DENSITY
    return torch.stack(found), (second - found[0].square()).clamp_min(0)


@dataclass(frozen=True)
class Filters:
    """The weights of a layer, `(outputs, inputs of a group, taps ...)`, and how far apart its kernel reads."""

    weight: Tensor
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def flat(self) -> Tensor:
        """Weights of shape `(outputs, inputs, taps)`, in double precision."""
        weight = self.weight.detach().double().cpu()
        return weight.reshape(weight.size(0), weight.size(1), -1)

    def distances(self, shift: tuple[int, ...]) -> Tensor:
        """Return how far kernel taps `t` and, `shift` outputs further, `s` are apart: `(taps, taps)`."""
        total = torch.zeros(1, 1, dtype=torch.float64)
        for axis, step in enumerate(shift):
            taps = torch.arange(self.weight.size(2 + axis), dtype=torch.float64) * self.dilation[axis]
            apart = (taps[None, :] + self.stride[axis] * step - taps[:, None]).abs()
            size = len(total) * len(taps)
            total = (total[:, None, :, None] + apart[None, :, None, :]).reshape(size, size)
        return total


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's channels behind norm and activation, before they are correlated: input of `covariances`.

    `terms` are the Hermite coefficients, `(9, C)`, the first the mean, `variance` `(C,)`, and `rho`, `(shifts, C, C)`,
    the correlations in front of the activation. `apart` tells how far one place is from the next, in places of the
    layer's input.
    """

    terms: Tensor
    variance: Tensor
    rho: Tensor
    apart: tuple[int, ...] = ()

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, `(C,)`."""
        return self.terms[0]

    def covariances(self) -> Tensor:
        """Return the covariances, `(shifts, C, C)`; the first shift is none."""
        total = torch.zeros_like(self.rho)
        for shift, rho in zip(total, self.rho, strict=True):
            for term in self.terms[1:].flip(0):  # Horner's rule in place: these are the largest matrices of a network
                shift.addr_(term, term).mul_(rho)
        diagonal = total[0].diagonal()
        diagonal.copy_(torch.maximum(diagonal, self.variance))  # what the series leaves out
        return total


def correlations(filters: Filters, shifts: list[tuple[int, ...]]) -> Tensor:
    """Return the correlation of outputs `i` at some place and `j` at that place plus each shift: `(shifts, C, C)`."""
    weight = filters.flat
    fading = [torch.pow(_fading(), filters.distances(shift)) for shift in shifts]
    spreads = [torch.einsum("ict,ts->ics", weight, one).flatten(1) for one in fading]
    covariance = torch.stack([spread @ weight.flatten(1).t() for spread in spreads])
    return _normalised(covariance, variances(filters))


def variances(filters: Filters) -> Tensor:
    """Return the variance of each output, `(C,)`, for inputs of variance one that fade between places."""
    weight, here = filters.flat, (0,) * (filters.weight.dim() - 2)
    return torch.einsum("ict,ts,ics->i", weight, torch.pow(_fading(), filters.distances(here)), weight)


def behind_norm(
    filters: Filters, scale: Tensor, shift: Tensor, bias: Tensor | None, *, centred: bool
) -> tuple[Filters, Tensor, Tensor]:
    """Return a layer that reads what a norm scales and shifts, both `(inputs,)`, as filters of inputs of variance one.

    Also, the deviation and the mean of its outputs, both `(C,)`; what is padded counts as the rest. Where a norm has
    `centred` all channels of a place, they sum to zero before they are scaled: any two correlate by `-1/(inputs - 1)`.
    """
    flat = filters.flat
    mean = flat.sum(2) @ shift
    if bias is not None:
        mean = mean + bias.detach().double().cpu()
    scaled = flat * scale[:, None]
    if centred and len(scale) > 1:
        scaled = (scaled - scaled.mean(1, keepdim=True)) * math.sqrt(len(scale) / (len(scale) - 1))
    read = replace(filters, weight=scaled.reshape(filters.weight.shape))
    return read, variances(read).clamp_min(0).sqrt(), mean


def depthwise_correlations(before: Moments, filters: Filters) -> Tensor:
    """Return the correlation of what a depthwise convolution makes of channels, `(1, C, C)`.

    Between places these are as alike as at one place, times what fades. With `W` the filters and `F_n` the fading of
    the taps to the power `n`, each term of Mehler's formula comes times `W F_n W^T`; what the series leaves out is
    taken to be independent between places.
    """
    weight, rho = filters.flat[:, 0], before.rho[0]
    reach = filters.distances((0,) * (filters.weight.dim() - 2)) * max(before.apart, default=1)
    fading = torch.pow(_fading(), reach)
    power, faded, total = torch.ones_like(rho), torch.ones_like(fading), torch.zeros_like(rho)
    for term in before.terms[1:]:
        power, faded = power * rho, faded * fading
        total += power * (term[:, None] * term) * (weight @ faded @ weight.t())
    rest = (before.variance - before.terms[1:].square().sum(0)).clamp_min(0)
    total.diagonal().add_(rest * weight.square().sum(1))
    return _normalised(total[None], total.diagonal())


def activated(
    scale: Tensor, shift: Tensor, activation: Callable[[Tensor], Tensor], rho: Tensor, apart: tuple[int, ...] = ()
) -> Moments:
    """Return moments behind an activation of what has deviations `scale`, means `shift`, both `(C,)`, and correlations
    `rho`, `(shifts, C, C)`, before it.

    Statistics that are no numbers are the caller's care.
    """
    return Moments(*hermite(scale, shift, activation), rho, apart)


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the deviation and the mean of each channel behind a batch norm, both `(C,)`."""
    gamma, beta = (
        torch.full_like(norm.running_var, value) if given is None else given.detach()
        for given, value in ((norm.weight, 1.0), (norm.bias, 0.0))
    )
    variance = norm.running_var.double().cpu()
    # what a running variance near zero lets through is less than gamma
    gamma = gamma.double().cpu() * (variance / (variance + norm.eps)).sqrt()
    return gamma, beta.double().cpu()


def _fading() -> Tensor:
    return torch.tensor(FADING, dtype=torch.float64)


def _normalised(covariance: Tensor, variance: Tensor) -> Tensor:
    scale = variance.clamp_min(1e-30).rsqrt()
    return (covariance * scale[:, None] * scale).clamp(-1, 1)
