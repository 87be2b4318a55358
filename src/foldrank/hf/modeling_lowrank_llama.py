"""A folded low-rank Llama for plain transformers: `from_pretrained(DIR, trust_remote_code=True)`.

foldrank copies this file into each folded checkpoint. It needs torch and transformers, nothing else.
Each converted layer computes y = B act(A x) (arXiv 2606.28932, after the fold).
"""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

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


def _insert_low_rank_layers(model: PreTrainedModel) -> None:
    low_rank = model.config.low_rank
    if low_rank is None:
        return
    if low_rank["residual"] is not None:
        raise ValueError("this checkpoint is not folded: load it with foldrank, or fold it first (foldrank fold)")
    prefix = model.base_model_prefix + "."
    for name, linear in list(model.named_modules()):
        rank = low_rank["rank"].get(name.removeprefix(prefix))
        if rank is not None and isinstance(linear, nn.Linear):
            args = linear.in_features, linear.out_features, rank, low_rank["activation"], linear.bias is not None
            model.set_submodule(name, LowRankLinear(*args).to(linear.weight.dtype))


class LowRankLlamaConfig(LlamaConfig):
    """A Llama config with `low_rank`: the rank of each converted layer by name, and the activation between factors."""

    model_type = "lowrank_llama"
    low_rank: dict | None = None


class LowRankLlamaModel(LlamaModel):
    """The Llama decoder with low-rank linear layers."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        _insert_low_rank_layers(self)


class LowRankLlamaForCausalLM(LlamaForCausalLM):
    """The Llama language model with low-rank linear layers."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        _insert_low_rank_layers(self)
