"""Whether a linear layer is nothing but a product with its weight: asked wherever a weight is read past its module.

Adapters, quantizers, offloading, pruning, weight norm and hooks all act when the module is called. Who multiplies by
`module.weight` himself would skip them in silence.
"""

from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from foldrank.core.dtensor import is_dtensor

OFFLOADED = "its weight is offloaded, or on the meta device"


def what_is_on(linear: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """What stands between `linear` and a product with `linear.weight`, in words; None where nothing does.

    Args:
        linear: a module that is to be a linear layer.
        kind: the one class that it may have.
    """
    if type(linear) is not kind:
        package = type(linear).__module__.partition(".")[0]
        return f"it is a {type(linear).__name__} of {package}"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed from others (weight norm, spectral norm or pruning)"
    # torch.export has a FakeTensor stand for a plain parameter, and wraps one where it stands for another class.
    if type(weight) not in (nn.Parameter, FakeTensor) and not is_dtensor(weight):
        return f"its weight is a {type(weight).__name__}"
    if "forward" in vars(linear):
        return "its forward is replaced (accelerate and tensor parallelism do that)"
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or torch_module._has_any_global_hook():
        return "it has hooks"
    return OFFLOADED if weight.is_meta else None
