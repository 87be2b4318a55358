"""A step of each rule: what becomes of a group's parameters, given their gradients and the optimizer's state.

Shape suffixes of factors: A (r, d_in), B (d_out, r).
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from foldrank.core.dtensor import distribute_like, full_tensor, to_local
from foldrank.optim.newton_schulz import orthogonalized

State = MutableMapping[Tensor, dict[str, Any]]

UPDATE_RMS = 0.2
"""Root mean square of an update of Muon over that of its learning rate: as of AdamW's, so that one rate serves both
(Moonlight, arXiv 2502.16982)."""


def adamw_(group: Mapping[str, Any], state: State, _: Callable[[Tensor], Tensor]) -> None:
    """AdamW by PyTorch's own function, fused where it can be; of sharded parameters, on the part of this process."""
    params = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not params:
        return
    for parameter in params:
        if not state[parameter]:
            state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    torch_adamw(
        [to_local(parameter) for parameter in params],
        [to_local(parameter.grad) for parameter in params],  # pyright: ignore[reportArgumentType]
        [to_local(state[parameter]["exp_avg"]) for parameter in params],
        [to_local(state[parameter]["exp_avg_sq"]) for parameter in params],
        [],
        [state[parameter]["step"] for parameter in params],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def muon_(group: Mapping[str, Any], state: State, _: Callable[[Tensor], Tensor]) -> None:
    """Orthogonalized momentum of each matrix, scaled by 0.2 sqrt(its largest side) (Muon, Jordan 2024; Moonlight)."""
    params = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter, update in zip(params, _directions(params, group, state), strict=True):
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * max(parameter.shape) ** 0.5)


def spectron_(group: Mapping[str, Any], state: State, effective: Callable[[Tensor], Tensor]) -> None:
    """Orthogonalized momentum of both factors, with a step that bounds the change of B* A (arXiv 2602.12429).

        eta / (sigma_A + sigma_B + 1),   sigma the spectral norms of A and B*, by one power iteration a step

    The parameters are A and B of one layer after the other. B* is B with its residual, if there is one. A norm of 0, as
    of B where it starts at 0, makes the step eta / (sigma_A + 1).
    """
    pairs = zip(group["params"][::2], group["params"][1::2], strict=True)
    trained = [(down, up) for down, up in pairs if down.grad is not None and up.grad is not None]
    params = [factor for pair in trained for factor in pair]
    updates = dict(zip(params, _directions(params, group, state), strict=True))
    for down, up in trained:
        sigmas = [_spectral_norm(effective(factor), state[factor]) for factor in (down, up)]
        step = group["lr"] / (sigmas[0] + sigmas[1] + 1)
        for factor in (down, up):
            factor.mul_(1 - group["lr"] * group["weight_decay"])
            factor.sub_((updates[factor] * step).to(factor.dtype))


def _directions(params: list[Any], group: Mapping[str, Any], state: State) -> list[Tensor]:
    """Each matrix's orthogonalized momentum, with Nesterov's look ahead; a sharded one is gathered first."""
    updates = []
    for parameter in params:
        if not state[parameter]:
            state[parameter] = {"momentum": torch.zeros_like(parameter)}
        momentum = state[parameter]["momentum"]
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        updates.append(full_tensor(torch.lerp(parameter.grad, momentum, group["momentum"])))
    whole = orthogonalized(updates, dtype=getattr(torch, group["iterates_in"]) if group["iterates_in"] else None)
    return [distribute_like(update, like=parameter) for update, parameter in zip(whole, params, strict=True)]


def _spectral_norm(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """The largest singular value, from below: one power iteration, which goes on from step to step."""
    if "vector" not in state:
        state["vector"] = torch.ones(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    image = matrix @ state["vector"]
    vector = matrix.mT @ image
    norm = vector.norm()
    if norm > 0:
        state["vector"] = vector / norm
    return (matrix @ state["vector"]).norm()


RULES: dict[str, Callable[[Mapping[str, Any], State, Callable[[Tensor], Tensor]], None]] = {
    "adamw": adamw_,
    "muon": muon_,
    "spectron": spectron_,
}
"""From a rule's name to its step."""
