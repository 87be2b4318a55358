"""The loss of the output head in chunks of tokens, so that the logits of a whole batch never exist at one moment.

With n tokens and V entries of the vocabulary, logits, log-probabilities and their gradient are n V numbers each: in a
small model the largest thing that a step holds. Here a chunk of rows goes through head, softmax and their gradient
before the next one begins, in the forward pass, where all of it is known but the factor that the backward pass brings:

    z = h W^T,   loss = sum_n log sum_v exp z_nv - z_n,y(n),   dz = softmax(z) - onehot(y),   dh = dz W,   dW = dz^T h

This is the fused linear cross-entropy of Liger Kernel (arXiv 2410.10989). No product is computed twice. What stays for
the backward pass is dh and dW; in bfloat16 too, dW is summed over the chunks in float32.

PyTorch 2.13 has the same as `torch.nn.functional.linear_cross_entropy(..., options=LinearCrossEntropyOptions())`, which
is not used here because autocast does not reach it, and from bfloat16 inputs it returns the loss in bfloat16, which at
10 nats goes in steps of 0.06. In float32 it takes the time and memory of what follows.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from foldrank.data.sequences import IGNORED

CHUNK = 256
"""Tokens per chunk: fewer hold less, and write dW more often."""


def chunk_loss_(model: PreTrainedModel) -> None:
    """Makes this model compute its training loss in chunks; parameters, state dict and class stay what they are.

    Only a forward pass in training mode with `labels` changes: it returns the same loss and no logits. Evaluation and
    generation run the architecture's own forward pass. The head's weight is used inside the head's own forward pass,
    where FSDP has gathered it.

    Raises:
        ValueError: for a model whose output head is not a linear layer without bias.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"the output head of this {type(model).__name__} is {head}: train.chunked_loss is for linear heads without "
            "bias; leave it out"
        )
    # On the instances, as Liger Kernel does: a subclass would save under another name, and tools look for nn.Linear.
    _bind(head, _head_forward)
    _bind(model, _model_forward)


def is_chunked(model: nn.Module) -> bool:
    """Whether `chunk_loss_` has been at a model."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return head is not None and getattr(head.forward, "__func__", None) is _head_forward


@torch.no_grad()
def token_losses_by_chunks(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, **others: Any) -> Tensor:
    """The cross-entropy of each label, 0 where it does not count, without the logits of all tokens at one moment.

    Shape:
        input_ids (batch, time), labels (batch, time - 1): those of the positions from the second on, and the result.
    """
    return model(input_ids, labels=labels, each_token=True, use_cache=False, **others)


def _losses_of_tokens(model: Any, input_ids: Tensor, labels: Tensor, **others: Any) -> Tensor:
    hidden_ND = model.base_model(input_ids, **others).last_hidden_state[:, :-1].flatten(0, 1)
    head: Any = model.get_output_embeddings()
    label_N = labels.flatten()
    # Allocated once: small results between the logits of two chunks would keep the heap from using their memory again.
    loss_N = torch.empty(label_N.shape, dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=labels.device)
    for start in range(0, len(label_N), CHUNK):
        rows = slice(start, start + CHUNK)
        z_CV = head(hidden_ND[rows]).to(loss_N.dtype)
        loss_N[rows] = F.cross_entropy(z_CV, label_N[rows], ignore_index=IGNORED, reduction="none")
        del z_CV
    return loss_N.view(labels.shape)


def transient_bytes(tokens: int, d: int, vocabulary: int, width: int) -> int:
    """Bytes of the most that the head takes by chunks: a chunk in the forward pass beside the head's input, or in the
    backward pass both gradients once more, scaled, or three tensors of the last norm, when what the head kept is gone.

    Args:
        tokens: of a forward pass.
        d: width of the residual stream.
        vocabulary: entries of the head.
        width: bytes of a number in a product, 4 or 2.
    """
    rows = min(CHUNK, tokens)
    logits, cast = 4 * vocabulary * rows, 0
    if width == 2:
        # The weight's copy, a chunk's input, and its logits in both widths, or its share of the weight's gradient.
        cast = 2 * vocabulary * d + 2 * d * rows + max(logits // 2, 2 * vocabulary * d - logits // 2)
    weight, hidden = 4 * vocabulary * d, d * tokens
    scaled = weight + (6 if width == 2 else 4) * hidden
    return max(logits + cast + 4 * hidden, scaled, (3 * 4 - width) * hidden - weight)


def _bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)
    # nn.DataParallel copies the attributes of a module, bound methods and all: its copies would call the original.
    module._replicate_for_data_parallel = MethodType(_replicate, module)


def _replicate(self: Any) -> Any:
    replica = type(self)._replicate_for_data_parallel(self)
    replica.forward = MethodType(self.forward.__func__, replica)
    return replica


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor) -> Tensor:
    """Cross-entropy of `hidden weight^T`, summed over the labels that count and divided by `items`, by chunks.

    The result is at least float32. `items` divides before dz is rounded to bfloat16, as in the plain backward pass.

    Shape:
        hidden (tokens, features), weight (vocabulary, features), labels (tokens,), items (), result ().
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, labels, items, dtype)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        counts = labels != IGNORED
        weights = counts / items.to(wide)  # of each token in the loss: 1 / items, or 0
        targets = labels.where(counts, 0)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix_VD = weight.to(dtype)
            loss = torch.zeros((), dtype=wide, device=hidden.device)
            d_hidden_ND = torch.empty_like(hidden, dtype=dtype)
            d_weight_VD = torch.zeros_like(weight, dtype=wide)
            for start in range(0, len(hidden), CHUNK):
                rows = slice(start, start + CHUNK)
                hidden_CD = hidden[rows].to(dtype)
                z_CV = F.linear(hidden_CD, matrix_VD).to(wide)
                loss += _loss_and_gradient_(z_CV, targets[rows, None], weights[rows, None])
                d_z_CV = z_CV.to(dtype)
                del z_CV
                torch.mm(d_z_CV, matrix_VD, out=d_hidden_ND[rows])
                if dtype == wide:
                    torch.addmm(d_weight_VD, d_z_CV.T, hidden_CD, out=d_weight_VD)
                else:
                    d_weight_VD += d_z_CV.T @ hidden_CD
                del d_z_CV  # or it would stay beside the next chunk
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator forgets the arguments' names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        (d_loss,) = grad_outputs
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        return (d_hidden_ND * d_loss).to(hidden), (d_weight_VD * d_loss).to(weight), None, None, None


def _loss_and_gradient_(z_CV: Tensor, target_C1: Tensor, weight_C1: Tensor) -> Tensor:
    """The loss of a chunk's logits, whose place its gradient takes."""
    z_CV -= z_CV.amax(1, keepdim=True)
    target_z_C1 = z_CV.gather(1, target_C1)
    sums_C1 = z_CV.exp_().sum(1, keepdim=True)
    z_CV *= weight_C1 / sums_C1
    z_CV.scatter_add_(1, target_C1, -weight_C1)
    return ((sums_C1.log() - target_z_C1) * weight_C1).sum()


def _head_forward(
    self: nn.Linear, hidden: Tensor, labels: Tensor | None = None, items: Tensor | int | None = None
) -> Tensor:
    if labels is None:
        return F.linear(hidden, self.weight)
    count = (labels != IGNORED).sum() if items is None else torch.as_tensor(items, device=hidden.device)
    return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten(), count)


def _model_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    each_token: bool = False,
    **kwargs: Any,
) -> CausalLMOutputWithPast | Tensor:
    if each_token:  # by the model's forward pass, which gathers what FSDP has sharded
        assert input_ids is not None
        assert labels is not None
        return _losses_of_tokens(self, input_ids, labels, attention_mask=attention_mask, **kwargs)
    if labels is None or not (self.training and torch.is_grad_enabled()):
        given = {"labels": labels, "num_items_in_batch": num_items_in_batch, **kwargs}
        return type(self).forward(self, input_ids, attention_mask, *args, **given)
    hidden = self.base_model(input_ids, attention_mask, *args, **kwargs).last_hidden_state
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].to(hidden.device)
    return CausalLMOutputWithPast(loss=self.get_output_embeddings()(hidden, shifted, num_items_in_batch))
