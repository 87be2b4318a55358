"""Low-rank layers from weights that exist: the best approximation of each, by itself or as its inputs weigh it.

    svd           B A is the rank-r matrix nearest to W in the Frobenius norm (Eckart and Young 1936)
    activations   the one nearest to W on a sample: it minimizes the sum of |(W - B A) x|^2 over the layer's inputs x,
                  which is the same for W C^(1/2), C = E[x x^T] (whitened SVD, as in arXiv 2403.07378)
    regression    where a function stands between the factors no factors give W: A is that of `activations`, each row
                  scaled to latents of root mean square `LATENTS`, and B what minimizes the sum of |W x - B act(A x)|^2
                  (least squares on the inputs that the dense model gives its layers)

Each singular value is shared out evenly, its root to either factor. Where a residual or a scale is there, B is what
gives the same: B* = s (B + c R). Computed in at least float32, on the device of the weight.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foldrank.core.functional import at_least_float32
from foldrank.core.linear import LowRankLinear

Approximation = Literal["svd", "activations", "regression"]

EXACT_UP_TO = 2048
"""The smaller side of a matrix up to which its singular values are all computed; above, the largest are, at random."""

OVERSAMPLING, PASSES = 32, 4
"""Of the randomized SVD (Halko, Martinsson and Tropp 2011): columns beyond the rank, and power iterations."""

DAMPING = 1e-6
"""Share of its mean that is added to the diagonal of C, so that directions without inputs count a little."""

LATENTS = 1.0
"""Smaller ones, for which SiLU is nearly linear, start nearer to W and end at a higher loss (EXPERIMENTS.md)."""


def low_rank_factors(
    weight: Tensor, rank: int, *, moment: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The factors A and B whose product approximates a weight best.

    Args:
        weight: W.
        rank: r.
        moment: C, the second moment of the layer's inputs; None: every direction counts alike.
        seed: of the randomized SVD, for matrices whose smaller side is above `EXACT_UP_TO`.

    Shape:
        weight (d_out, d_in), moment (d_in, d_in) to A (rank, d_in) and B (d_out, rank), in at least float32.

    Example:
        >>> A, B = low_rank_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> (B @ A).round(decimals=4).diag().abs().tolist()
        [3.0, 2.0, 0.0]
    """
    W = weight.detach().to(at_least_float32(weight.dtype))
    root = inverse = None
    if moment is not None:
        root, inverse = _roots(moment.to(W.device))
        W = W @ root.to(W.dtype)
    U, S, V = _largest(W, rank, seed)
    share = S.sqrt()
    A = share[:, None] * V.mT
    return (A if inverse is None else A @ inverse.to(W.dtype)), U * share


@torch.no_grad()
def approximate_(
    layer: LowRankLinear, weight: Tensor, bias: Tensor | None = None, *, moment: Tensor | None = None, seed: int = 0
) -> None:
    """Sets the factors of a layer, in place, so that it computes the best approximation of W x + b.

    Arguments as for `low_rank_factors`.

    Raises:
        ValueError: for a layer on another backbone than plain low rank, for which there is no such start.
    """
    if type(layer) is not LowRankLinear or layer.activation is not None:
        what = f"a {layer.activation_name} between the factors" if layer.activation else type(layer).__name__
        near = ", or init regression, which comes near it" if type(layer) is LowRankLinear else ""
        raise ValueError(
            f"no factors approximate a weight with {what}: take plain low rank (activation null, backbone lowrank)"
            + near
        )
    _set_(layer, *low_rank_factors(weight, layer.rank, moment=moment, seed=seed), bias)


def _set_(layer: LowRankLinear, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    layer.down.weight.copy_(A)
    set_effective_(layer, B)
    if layer.up.bias is not None:
        layer.up.bias.zero_() if bias is None else layer.up.bias.copy_(bias)


@torch.no_grad()
def set_effective_(layer: LowRankLinear, effective: Tensor) -> None:
    """Sets B, in place, so that the layer multiplies its latents by `effective`: B = B* / s - c R."""
    scale = 1.0 if layer.scale is None else layer.scale.coefficient()
    added = layer.effective_weight(torch.zeros_like(effective))  # s c R
    layer.up.weight.copy_((effective - added) / scale)


def approximate_all_(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    weights: Mapping[str, tuple[Tensor, Tensor | None]],
    how: Approximation,
    sample: Iterable[Any] = (),
    seed: int = 0,
) -> None:
    """Sets the factors of all `layers`, in place, from the weights and biases that they stand for, one at a time.

    Raises:
        ValueError: as `approximate_`, and as `input_moments`.
    """
    if how == "regression":
        _regress_all_(model, layers, weights, list(sample), seed)
        return
    moments = input_moments(model, weights, sample) if how == "activations" else {}
    for name, layer in layers.items():
        weight, bias = weights[name]
        try:
            approximate_(layer, weight, bias, moment=moments.pop(name, None), seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def _regress_all_(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    weights: Mapping[str, tuple[Tensor, Tensor | None]],
    sample: Sequence[Any],
    seed: int,
) -> None:
    for name, layer in layers.items():
        if type(layer) is not LowRankLinear or layer.activation is None:
            raise ValueError(
                f"{name}: init regression is for low rank with a function between the factors: take activations"
            )
    moments = input_moments(model, weights, sample)
    downs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, _ = low_rank_factors(weights[name][0], layer.rank, moment=moments[name], seed=seed)
        C = moments[name].to(A)
        downs[name] = A * (LATENTS / ((A @ C) * A).sum(1).clamp(min=1e-30).sqrt())[:, None]
    products: dict[str, list[Tensor]] = {}

    def add(name: str, x: Tensor) -> None:
        activation = layers[name].activation
        assert activation is not None
        s = activation(x @ downs[name].to(x).mT)
        found = [(each.mT @ s).to(torch.float64) for each in (s, x)]
        products[name] = [one + other for one, other in zip(found, products.get(name, (0, 0)), strict=True)]

    _over_inputs(model, layers, sample, add)
    for name, layer in layers.items():
        (weight, bias), (latents, inputs) = weights[name], products[name]
        damped = latents + DAMPING * latents.diagonal().mean() * torch.eye(len(latents)).to(latents)
        B = torch.linalg.solve(damped, weight.to(torch.float64) @ inputs, left=False)
        _set_(layer, downs[name], B.to(downs[name]), bias)


@torch.no_grad()
def input_moments(model: nn.Module, names: Collection[str], sample: Iterable[Any]) -> dict[str, Tensor]:
    """C = E[x x^T] of the inputs of linear layers, over a sample, in float64 on the layer's device.

    Args:
        model: as it is called for its outputs; it runs in eval mode.
        names: of its linear layers.
        sample: batches: a mapping is given to the model by name, anything else as its argument.

    Raises:
        ValueError: for a sample with which some layer is never called.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, x: Tensor) -> None:
        product = (x.mT @ x).to(torch.float64)
        sums[name] = sums[name] + product if name in sums else product
        counts[name] += len(x)

    _over_inputs(model, names, sample, add)
    if unseen := [name for name, count in counts.items() if not count]:
        raise ValueError(f"the sample never reaches {unseen[0]}: this start needs batches that do")
    return {name: sums[name] / counts[name] for name in names}


def _over_inputs(
    model: nn.Module, names: Iterable[str], sample: Iterable[Any], add: Callable[[str, Tensor], None]
) -> None:
    """Gives `add` the inputs (tokens, d_in) of linear layers, in at least float32, batch by batch."""

    def seen(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        add(name, x.reshape(-1, x.shape[-1]).to(at_least_float32(x.dtype)))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(seen, name)) for name in names]
    training = model.training
    model.eval()
    try:
        for batch in sample:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and its inverse, C damped."""
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    roots = (values.clamp(min=0) + DAMPING * values.mean().clamp(min=1e-30)).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _largest(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, and U and V, (d_out, r) and (d_in, r)."""
    if min(W.shape) <= EXACT_UP_TO or 2 * (rank + OVERSAMPLING) > min(W.shape):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    else:
        devices = [W.device] if W.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, q=rank + OVERSAMPLING, niter=PASSES)
    return U[:, :rank], S[:rank], V[:, :rank]
