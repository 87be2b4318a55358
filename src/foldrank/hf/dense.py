"""A folded model as a plain dense one of its family, which any tool of that family runs: W = B A, and S of SLTrain.

It has the parameters and the speed of the dense architecture again; what it keeps is the function. Only where nothing
stands between the factors is there such a W.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldrank.core.inventory import inventory, low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.hf.crnet import CrossLayerLinear
from foldrank.hf.families import LOW_RANK_CLASSES
from foldrank.hf.remote_code import FAMILIES


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model of transformers that computes the same, in the dtype of the model.

    Args:
        model: low-rank, folded, on the CPU.

    Raises:
        ValueError: for a model that is dense or unfolded, and for layers that no matrix replaces.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError("the model is dense already")
    for name, layer in layers.items():
        _check(name, layer)
    family = FAMILIES[type(model.config)]
    dense_class: Any = next(dense for dense, low_rank in LOW_RANK_CLASSES.items() if low_rank is type(model))
    fields = copy.deepcopy(model.config.to_dict())
    for name in ("low_rank", "auto_map", "model_type", "architectures"):
        fields.pop(name, None)
    with torch.device("meta"):
        dense = dense_class(family.config(**fields))
    state = {name: tensor for name, tensor in model.state_dict().items() if not _inside(name, layers)}
    specs = inventory(dense).linear_specs
    for name, layer in layers.items():
        weight, bias = _matrix(layer)
        state[f"{name}.weight"] = weight if isinstance(specs[name].module, torch.nn.Linear) else weight.mT.contiguous()
        if bias is not None:
            state[f"{name}.bias"] = bias
    dense.load_state_dict(state, assign=True)
    dense.tie_weights()
    if model.generation_config is not None:
        dense.generation_config = copy.deepcopy(model.generation_config)
    return _with_buffers_of(dense, model).eval()


def _check(name: str, layer: LowRankLinear) -> None:
    if layer.weight_parametrizations:
        raise ValueError(f"{name} is not folded: fold the model first (foldrank fold)")
    if layer.activation is not None:
        raise ValueError(
            f"{name} computes B {layer.activation_name}(A x), which no dense matrix does: the checkpoint runs in "
            "transformers as it is (trust_remote_code=True, the file beside the weights)"
        )
    if isinstance(layer, CrossLayerLinear):
        raise ValueError(f"{name} adds what the block before gave (crnet), which no dense layer does")


def _matrix(layer: LowRankLinear) -> tuple[Tensor, Tensor | None]:
    """W and b: what the layer makes of the unit vectors, in float32 at least."""
    own, bias = next(layer.parameters()).dtype, layer.up.bias
    wide = copy.deepcopy(layer).to(torch.promote_types(own, torch.float32))
    columns = wide(torch.eye(layer.in_features, dtype=wide.up.weight.dtype))
    columns = columns if wide.up.bias is None else columns - wide.up.bias
    return columns.mT.contiguous().to(own), bias


def _inside(name: str, layers: Any) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _with_buffers_of(dense: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Buffers that are in no state dict, such as rotary frequencies, are the same in both."""
    theirs = dict(model.named_buffers())
    for name, buffer in list(dense.named_buffers()):
        if buffer.is_meta:
            holder, _, attribute = name.rpartition(".")
            setattr(dense.get_submodule(holder), attribute, theirs[name].clone())
    return dense
