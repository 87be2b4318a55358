"""Whether a linear layer is nothing but a product with its weight: asked wherever a weight is read past its module.

Adapters, quantizers, offloading, pruning, weight norm and hooks all act when the module is called. Who multiplies by
`module.weight` himself would skip them in silence.
"""

from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from foldrank.core.dtensor import is_dtensor


def what_is_on(linear: nn.Module) -> str | None:
    """What stands between `linear` and `F.linear(x, linear.weight, linear.bias)`, in words; None where nothing does."""
    weight = linear._parameters.get("weight") if isinstance(linear, nn.Module) else None
    if type(linear) is not nn.Linear:
        package = type(linear).__module__.partition(".")[0]
        return f"it is a {type(linear).__name__} of {package}"
    if weight is None:
        return "its weight is computed from others (weight norm, spectral norm or pruning)"
    # torch.export has a FakeTensor stand for a plain parameter, and wraps one where it stands for another class.
    if type(weight) not in (nn.Parameter, FakeTensor) and not is_dtensor(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "its weight is offloaded, or on the meta device"
    if "forward" in vars(linear):
        return "its forward is replaced (accelerate and tensor parallelism do that)"
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or torch_module._has_any_global_hook():
        return "it has hooks"
    return None
