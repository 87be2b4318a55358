"""A folded low-rank Llama for plain transformers: `from_pretrained(DIR, trust_remote_code=True)`.

foldrank writes this file into each checkpoint. It needs torch and transformers, nothing else.
Each converted layer computes y = B act(A x) (arXiv 2606.28932, after the fold), on SLTrain's backbone plus S x.
"""

import re
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import LlamaConfig as DenseConfig
from transformers import LlamaForCausalLM as DenseForCausalLM
from transformers import LlamaModel as DenseModel

ACTIVATIONS = {None: nn.Identity, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


class LowRankLinear(nn.Module):
    """y = up(activation(down(x)))."""

    def __init__(self, in_features: int, out_features: int, rank: int, activation: str | None, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


class SparseLowRankLinear(LowRankLinear):
    """y = up(activation(down(x))) + S x, S sparse: its `values` by row, in `columns`, `rows` says where each begins."""

    rows: Tensor
    columns: Tensor

    def __init__(self, in_features: int, out_features: int, *args: Any, density: float, **_: Any) -> None:
        super().__init__(in_features, out_features, *args)
        count = max(1, int(density * in_features * out_features))
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("rows", torch.zeros(out_features + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        table = x.to(y.dtype).reshape(-1, x.shape[-1]).T.contiguous()
        weights = self.values.to(y.dtype)
        bags = F.embedding_bag(
            self.columns, table, self.rows, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return y + bags.T.reshape(y.shape)


BACKBONES = {"lowrank": LowRankLinear, "sltrain": SparseLowRankLinear}


def tensor_parallel_plan(dense: dict[str, str] | None, low_rank: dict | None, blocks: int) -> dict[str, str] | None:
    """How a server splits a model over ranks: never the rank, so that what ranks sum is as wide as the latent.

    Of a layer that the dense architecture splits by its outputs, `up` is split by them; of one that it splits by its
    inputs, `down` is; the other factor is on each rank.

    Args:
        dense: the architecture's plan, from the pattern of a module's name to how it is split; None has none.
        low_rank: the config's.
        blocks: decoder blocks of the model.

    Returns:
        The plan; None where there is none: unfolded, on another backbone, or with a layer dense in some blocks alone.
    """
    if dense is None or low_rank is None:
        return dense
    unfolded = low_rank["residual"] is not None or low_rank["scale"] is not None
    if unfolded or low_rank["backbone"] != "lowrank" or not isinstance(low_rank["rank"], dict):
        return None
    counts = Counter(re.sub(r"\d+", "*", name) for name in low_rank["rank"])
    if not counts.keys() <= dense.keys() or any(count != blocks for count in counts.values()):
        return None
    factors = {pattern: f"{pattern}.{'up' if dense[pattern].startswith('col') else 'down'}" for pattern in counts}
    return {factors.get(pattern, pattern): style for pattern, style in dense.items()}


def _insert_low_rank_layers(model: PreTrainedModel) -> None:
    low_rank = model.config.low_rank
    if low_rank is None:
        return
    if low_rank["residual"] is not None or low_rank["scale"] is not None:
        raise ValueError("this checkpoint is not folded: import foldrank.hf, or fold it (foldrank fold CHECKPOINT)")
    layer_class, prefix = BACKBONES[low_rank["backbone"]], model.base_model_prefix + "."
    for name, dense in list(model.named_modules()):
        rank = low_rank["rank"].get(name.removeprefix(prefix))
        if rank is not None and not isinstance(dense, LowRankLinear):
            # GPT-2's Conv1D keeps its weight as (in, out).
            weight: Any = dense.weight
            out_features, in_features = weight.shape if isinstance(dense, nn.Linear) else weight.T.shape
            shape = in_features, out_features, rank, low_rank["activation"], dense.bias is not None
            model.set_submodule(name, layer_class(*shape, **low_rank["extra_config"]).to(weight.dtype))


class LowRankLlamaConfig(DenseConfig):
    """A Llama config with `low_rank`: the rank of each converted layer by name, activation, backbone and more."""

    model_type = "lowrank_llama"
    low_rank: dict | None = None

    @property
    def base_model_tp_plan(self) -> Any:
        return tensor_parallel_plan(super().base_model_tp_plan, self.low_rank, self.num_hidden_layers)


class LowRankLlamaModel(DenseModel):
    """The Llama decoder with low-rank linear layers."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        _insert_low_rank_layers(self)


# The heads of transformers ask AutoModel for what they stand on.
AutoModel.register(LowRankLlamaConfig, LowRankLlamaModel, exist_ok=True)


class LowRankLlamaForCausalLM(DenseForCausalLM):
    """The Llama language model with low-rank linear layers."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        _insert_low_rank_layers(self)


def _with_head(head: str) -> Any:
    """The low-rank variant of transformers' Llama with this head, a new one until it is fine-tuned."""
    dense: Any = getattr(transformers, f"Llama{head}")

    def initialize(self: Any, config: LowRankLlamaConfig) -> None:
        dense.__init__(self, config)
        _insert_low_rank_layers(self)

    body = {"__module__": __name__, "__doc__": _with_head.__doc__, "__init__": initialize}
    body |= {"config_class": LowRankLlamaConfig, "base_model_prefix": DenseForCausalLM.base_model_prefix}
    return type(f"LowRankLlama{head}", (dense,), body)


HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
globals().update({f"LowRankLlama{head}": _with_head(head) for head in HEADS if hasattr(transformers, f"Llama{head}")})
