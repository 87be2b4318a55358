"""A folded CR-Net Llama for plain transformers: `from_pretrained(DIR, trust_remote_code=True)`.

foldrank writes this file, and the one that it imports, into each folded checkpoint on the backbone `crnet`. They need
torch and transformers, nothing else. Each low-rank layer adds to its product what the same layer of the block before
gave (arXiv 2509.18993): Y_l = g Y_(l-1) + B A X_l, g learned.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from . import modeling_lowrank_llama as plain
from .modeling_lowrank_llama import BACKBONES, LowRankLinear
from .modeling_lowrank_llama import LowRankLlamaConfig as PlainConfig
from .modeling_lowrank_llama import LowRankLlamaForCausalLM as PlainForCausalLM
from .modeling_lowrank_llama import LowRankLlamaModel as PlainModel

EPSILON = 1e-6
"""So much farther from 0 is the gain than the parameter that it is made of, as in CR-Net's paper."""


def shortcut(b: Tensor, before: Tensor) -> Tensor:
    """sign(b) (|b| + 1e-6) times what the block before gave, in its dtype."""
    gain = b.sign() * (b.abs() + EPSILON)
    return gain.to(before.dtype) * before


def project(projection: nn.Module, x: Tensor, before: Tensor | None) -> Tensor:
    """What a projection gives for x; `before` is what that of the block before gave, None in the first block."""
    return projection(x, before) if hasattr(projection, "shortcut") else projection(x)


class CrossLayerAttention(llama.LlamaAttention):
    """Llama's attention, which also takes and gives what q, k, v and o are, before any rotation."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        before: tuple[Tensor | None, ...] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        three = zip((self.q_proj, self.k_proj, self.v_proj), before[:3], strict=True)
        q, k, v = (project(projection, hidden_states, output) for projection, output in three)
        heads = [output.view(shape).transpose(1, 2) for output in (q, k, v)]
        query, key = llama.apply_rotary_pos_emb(heads[0], heads[1], *position_embeddings)
        value = heads[2]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, llama.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        o = project(self.o_proj, context.reshape(*hidden_states.shape[:-1], -1).contiguous(), before[3])
        return o, weights, (q, k, v, o)


class CrossLayerMLP(llama.LlamaMLP):
    """Llama's MLP, which also takes and gives what gate, up and down are."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, before: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate = project(self.gate_proj, x, before[0])
        up = project(self.up_proj, x, before[1])
        down = project(self.down_proj, self.act_fn(gate) * up, before[2])
        return down, (gate, up, down)


class CrossLayerDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's block. From block to block goes a tuple: the residual stream and the outputs of the seven projections.

    So nothing is kept in a module, and a block compiles and checkpoints by itself. The first block takes the stream
    alone, and the last one gives it alone.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        first = isinstance(hidden_states, Tensor)
        x, *before = (hidden_states, *7 * [None]) if first else hidden_states
        attended, _, attention = self.self_attn(self.input_layernorm(x), *args, before=tuple(before[:4]), **kwargs)
        x = x + attended
        y, mlp = self.mlp(self.post_attention_layernorm(x), tuple(before[4:]))
        x = x + y
        last = self.self_attn.layer_idx + 1 == self.self_attn.config.num_hidden_layers
        return x if last else (x, *attention, *mlp)


def connect_(model: PreTrainedModel) -> None:
    """Lets the blocks of a Llama hand on what their projections give, in place; no parameter changes."""
    kinds: dict[type, type[nn.Module]] = {
        llama.LlamaAttention: CrossLayerAttention,
        llama.LlamaMLP: CrossLayerMLP,
        llama.LlamaDecoderLayer: CrossLayerDecoderLayer,
    }
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
        if isinstance(module, PreTrainedModel):
            module._no_split_modules = {*(module._no_split_modules or ()), CrossLayerDecoderLayer.__name__}


class CrossLayerLinear(LowRankLinear):
    """y = g y_before + up(activation(down(x)))."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shortcut = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return shortcut(self.shortcut, before) + super().forward(x)


BACKBONES["crnet"] = CrossLayerLinear


class LowRankLlamaConfig(PlainConfig):
    """The config of Llama on CR-Net's backbone, by which AutoModel tells it from the plain one."""


class LowRankLlamaModel(PlainModel):
    """The Llama decoder on CR-Net's backbone."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        connect_(self)


AutoModel.register(LowRankLlamaConfig, LowRankLlamaModel, exist_ok=True)


class LowRankLlamaForCausalLM(PlainForCausalLM):
    """The Llama language model on CR-Net's backbone."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig) -> None:
        super().__init__(config)
        connect_(self)


def _connected(unconnected: Any) -> Any:
    """The same model on CR-Net's backbone."""

    def initialize(self: Any, config: LowRankLlamaConfig) -> None:
        unconnected.__init__(self, config)
        connect_(self)

    body = {"__module__": __name__, "__doc__": unconnected.__doc__, "__init__": initialize}
    body["config_class"] = LowRankLlamaConfig
    return type(unconnected.__name__, (unconnected,), body)


globals().update({name: _connected(getattr(plain, name)) for name in (f"LowRankLlama{head}" for head in plain.HEADS)})
