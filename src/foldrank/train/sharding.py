"""A model spread over the processes of a run: each holds a share of all weights (FSDP2), or a part of each layer (TP).

`sharding: fsdp`

    meta device -> a block is filled (train/start.py) -> sharded -> the next block ... -> the rest is filled, sharded

So no process holds more than its shares, one block, and what lies outside of the blocks. A unit is a block: gathered
before its forward and backward pass, its gradients summed into the shares behind it. What is outside of the blocks is
one more, which the model's own forward pass alone gathers: nothing may call the embedding, the last norm or the head
past it.

`tensor_parallel: N`

    meta device -> a block is filled -> folded at the start -> its layers are split -> the next block ... -> the rest

Of a layer that the architecture splits by its outputs, `up` is split by them, of one that it splits by its inputs,
`down` is; the other factor, embedding, norms and head are on each process. The rank is never split, so that what
processes sum is as wide as the latent. Numbers that they sum, a token and block:

    forward   z of o and down, 2 r; backward   dz of q, k, v, gate and up, 5 r;   of a dense model 4 d in all

With `split_stream` what goes from block to block is split as well, by its width: both factors of all layers are, and
norms, so that a process holds 1/N of each block. Of what the first block gets each process takes its part, and before
the last norm all is gathered. Then processes sum

    forward   z of all seven layers, 7 r; backward   dz of all, 7 r;   and for each norm a number and its gradient

So no process holds the whole here either. What is a residual elsewhere is folded before it could be split.

Both: N processes that follow one another split the layers, and each of them shares its part, and what is not split,
with those in the same place of the other groups. A block is split, then sharded.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] - it is documented
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from foldrank.core.anchored_decay import AnchoredDecay, fold_at_start_
from foldrank.core.dtensor import is_dtensor
from foldrank.hf.base import LowRankConfigMixin
from foldrank.recipes.train_config import TrainConfig
from foldrank.train.stand_ins import blocks_of

SHARES, TENSORS = "shares", "tensors"
"""Names of the meshes over which weights are shared out, and layers split."""

STYLES: dict[str, Callable[[], ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""From transformers' words of a plan to PyTorch's."""

NORM = "norm"
"""In a plan: a norm over the width of the residual stream, of which each process has a part."""

Facts = TypeVar("Facts")

OF_HEADS = "replicated_with_grad_allreduce"
"""In a plan: a weight that each process has, and uses for its own heads alone (Qwen3's norms of q and k)."""


class Placement:
    """Leaves this process its share or part of a block's, and then of the model's weights, in place (`build_model`).

    Args:
        train: its `sharding`, `tensor_parallel` and `dtype`: with bfloat16 the blocks' weights are gathered in it, and
            gradients summed in float32.
        device: of this process.
        plan: by which blocks are split (`plan_of`), and those with residuals folded before; none: they are not split.
    """

    decay: AnchoredDecay | None
    """What goes with the blocks that were folded; None where none was."""

    def __init__(
        self, train: TrainConfig, device: torch.device, plan: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        if not dist.is_initialized():  # one process holds all shares
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        sizes = {SHARES: dist.get_world_size() // train.tensor_parallel} if train.sharding == "fsdp" else {}
        if plan:
            sizes[TENSORS] = train.tensor_parallel
            # It tells each process of each kind of exchange that takes two steps, as is meant.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self._mesh = init_device_mesh(device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
        self._plan, self._shards = plan, SHARES in sizes
        # Autocast says what is computed in bfloat16: what goes from block to block stays in float32, as without shards.
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._of_blocks = narrow if train.dtype == "bfloat16" else MixedPrecisionPolicy()
        self._folds = bool(plan) and train.fold_at_start
        self.decay = None

    def __call__(self, module: nn.Module) -> None:
        is_block = not isinstance(module, PreTrainedModel)
        if self._plan and is_block:
            self._split_(module)
        if self._shards:
            policy = self._of_blocks if is_block else MixedPrecisionPolicy()
            fully_shard(module, mesh=self._mesh[SHARES], mp_policy=policy)
        if NORM in self._plan.values() and not is_block:
            self._split_stream_(module)
        for parameter in self._of_heads(module) if is_block else ():
            if self._shards:  # once a step, when the shares of its gradient are summed
                parameter.register_post_accumulate_grad_hook(self._sum_gradient_)
            else:
                parameter.register_hook(self._summed)

    def _split_(self, block: nn.Module) -> None:
        mesh, plan = self._mesh[TENSORS], self._plan
        if self._folds:
            decay = fold_at_start_(block).decay
            self.decay = decay if self.decay is None else self.decay + decay
        styles = {name: STYLES[way]() for name, way in plan.items() if way in STYLES}
        parallelize_module(block, mesh, styles, src_data_rank=None)
        for name in inputs_in_common(plan):
            block.get_submodule(name).register_forward_pre_hook(_replicated_input(mesh), with_kwargs=True)
        for name in (name for name, way in plan.items() if way == NORM):
            norm: Any = block.get_submodule(name)
            norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, (Shard(0),), src_data_rank=None))
            norm.forward = partial(_rms_normed, norm, mesh)

    def _split_stream_(self, model: Any) -> None:
        mesh = self._mesh[TENSORS]

        def part(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole = DTensor.from_local(args[0], mesh, (Replicate(),))
            return (whole.redistribute(mesh, (Shard(-1),)).to_local(), *args[1:])

        def whole(_: nn.Module, args: tuple[Any, ...]) -> Tensor:
            return DTensor.from_local(args[0], mesh, (Shard(-1),)).full_tensor(grad_placements=(Replicate(),))

        blocks_of(model)[0].register_forward_pre_hook(part)
        model.base_model.norm.register_forward_pre_hook(whole)

    def _of_heads(self, block: nn.Module) -> Iterator[nn.Parameter]:
        """Weights of which each process has the gradient of its own heads alone."""
        for name in (name for name, way in self._plan.items() if way == OF_HEADS):
            yield from block.get_submodule(name).parameters()

    def _summed(self, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=self._mesh.get_group(TENSORS))
        return total

    def _sum_gradient_(self, parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        dist.all_reduce(gradient.to_local(), group=self._mesh.get_group(TENSORS))


def by_first_process_(
    model: PreTrainedModel,
    whole: Callable[[], PreTrainedModel],
    begin: Callable[[PreTrainedModel], Facts],
    *,
    folded: bool,
) -> Facts:
    """Gives a model that is spread the weights that the first process makes in a whole one, in place; no other has one.

    Args:
        model: of which this process holds a share or a part.
        whole: makes the same model, all of it, on the CPU.
        begin: gives that one its weights.
        folded: whether `model` is folded already; then that one is as well, afterwards.

    Returns:
        What `begin` returned in the first process.

    Raises:
        ValueError, OSError: in all processes, where `begin` does in the first.
    """
    result: list[Any] = [None]
    weights = {}
    if dist.get_rank() == 0:
        try:
            source = whole()
            result = [begin(source)]
            if folded:
                fold_at_start_(source)
            weights = source.state_dict()
        except (ValueError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return result[0]


def is_spread(model: nn.Module) -> bool:
    """Whether each process holds a share or a part of the model alone."""
    return any(map(is_dtensor, model.parameters()))


def share_of(model: nn.Module) -> tuple[int, int]:
    """Which share of a step's sequences this process sees, and how many there are.

    As many as processes, except where they split layers among them (tensor parallelism): these see the same ones.
    """
    parameters: Any = model.parameters()
    for mesh in (parameter.device_mesh for parameter in parameters if is_dtensor(parameter)):
        names = mesh.mesh_dim_names or ()
        if TENSORS in names:
            return (mesh.get_local_rank(SHARES), mesh[SHARES].size()) if SHARES in names else (0, 1)
    return PartialState().process_index, PartialState().num_processes


def check_processes(train: TrainConfig, processes: int) -> int:
    """How many shares a step's sequences come in.

    Raises:
        ValueError: where the layers are split over another number of processes than there are.
    """
    parts, sharded = train.tensor_parallel, train.sharding == "fsdp"
    if processes % parts or (parts not in (1, processes) and not sharded):
        raise ValueError(
            f"tensor_parallel {parts} splits each layer over {parts} processes, and there are {processes}: start "
            f"{parts} (torchrun --nproc-per-node {parts} -m foldrank ...), or with --train.sharding fsdp a multiple"
        )
    return processes // parts


def check_spread(model: PreTrainedModel, train: TrainConfig) -> None:
    """Refuses a model, on any device, whose layers cannot be split as its settings ask.

    Raises:
        ValueError: saying why.
    """
    parts = train.tensor_parallel
    if parts == 1:
        if train.split_stream:
            raise ValueError("split_stream needs tensor_parallel, the number of processes that split the stream")
        return
    low_rank = getattr(model.config, "low_rank", None)
    if low_rank is not None and low_rank["residual"] is not None and not train.fold_at_start:
        raise ValueError(
            "tensor_parallel splits the outputs of up-projections, and a residual repeats each latent over them: set "
            "train.fold_at_start true, which trains the same"
        )
    plan_of(model, train)
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in (*sizes, "hidden_size") if train.split_stream else sizes:
        if (size := getattr(model.config, name)) % parts:
            raise ValueError(f"tensor_parallel {parts} does not divide {name} {size}: take one that does")


def plan_of(model: PreTrainedModel, train: TrainConfig) -> dict[str, str]:
    """How the modules of a block are split, from the name of each in it to the way; none where they are not.

    Raises:
        ValueError: where there is no plan: another backbone than low rank, a low-rank scale, a layer dense in some
            blocks alone, or an architecture for which transformers has none; with `split_stream`, any dense layer.
    """
    if train.tensor_parallel == 1:
        return {}
    config: Any = model.config
    low_rank = isinstance(config, LowRankConfigMixin)
    plan = config.tp_plan_without_residual if low_rank else config.base_model_tp_plan
    if not plan:
        raise ValueError(
            f"tensor_parallel: there is no plan by which this {type(model).__name__} is split; there is one for dense "
            "and low-rank layers without a scale, alike in all blocks, of architectures for which transformers has one"
        )
    in_block = {pattern.partition(".*.")[2]: way for pattern, way in plan.items() if ".*." in pattern}
    if unknown := sorted(set(in_block.values()) - {*STYLES, OF_HEADS}):
        raise ValueError(f"tensor_parallel: the plan of {type(model).__name__} splits {unknown[0]}, which is not built")
    return _with_stream(model, in_block) if train.split_stream else in_block


def _with_stream(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan by which the residual stream is split too: both factors of each layer, and the norms between them."""
    split = [name for name, way in plan.items() if way in STYLES]
    if dense := [name for name in split if not name.endswith((".up", ".down"))]:
        raise ValueError(f"split_stream is for blocks of low-rank layers alone, and {dense[0]} is dense: leave it out")
    layers = {name.rpartition(".")[0]: None for name in split}
    width, children = (model.config.hidden_size,), dict(blocks_of(model)[0].named_children())
    norms = [name for name, child in children.items() if [weight.shape for weight in child.parameters()] == [width]]
    if other := [name for name in norms if not hasattr(children[name], "variance_epsilon")]:
        raise ValueError(f"split_stream knows no norm as {other[0]} of {type(model).__name__}: leave it out")
    factors = {f"{layer}.{factor}": way for layer in layers for factor, way in (("down", "rowwise"), ("up", "colwise"))}
    return {**plan, **factors, **dict.fromkeys(norms, NORM)}


def inputs_in_common(plan: Mapping[str, str]) -> set[str]:
    """The modules of a block whose dense layers share an input: its gradient is summed over them, then over processes.

    Of low-rank layers each has a latent of its own, whose gradient is what is summed; beside one of them, dense layers
    sum apart.
    """
    by_outputs = [name for name, way in plan.items() if way == "colwise"]
    low_rank = {name.removesuffix(".up").rpartition(".")[0] for name in by_outputs if name.endswith(".up")}
    return {name.rpartition(".")[0] for name in by_outputs if not name.endswith(".up")} - low_rank


def _replicated_input(mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": DTensor.from_local(kwargs["hidden_states"], mesh, (Replicate(),))}
        return (DTensor.from_local(args[0], mesh, (Replicate(),)), *args[1:]), kwargs

    return hook


def _rms_normed(norm: Any, mesh: DeviceMesh, hidden: Tensor) -> Tensor:
    """RMSNorm over a width of which each process has a part, as transformers computes it; one number a token is summed.

    Left to DTensor, the backward pass would sum as many numbers as the width.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    squares = DTensor.from_local(wide.pow(2).sum(-1, keepdim=True), mesh, (Partial(),))
    mean = squares.redistribute(mesh, (Replicate(),)).to_local(grad_placements=(Partial(),)) / norm.weight.shape[0]
    return norm.weight.to_local() * (wide * torch.rsqrt(mean + norm.variance_epsilon)).to(hidden.dtype)


def parts_in(model: PreTrainedModel, train: TrainConfig) -> dict[int, tuple[int, ...]]:
    """From the id of each parameter to its shape in one process, of those that `train.tensor_parallel` splits."""
    parts, shapes, plan = train.tensor_parallel, {}, plan_of(model, train)
    for block in blocks_of(model):
        for name, way in plan.items():
            layer: Any = block.get_submodule(name)
            if way == NORM:
                shapes[id(layer.weight)] = (layer.weight.shape[0] // parts,)
            elif way == "rowwise":
                shapes[id(layer.weight)] = (layer.out_features, layer.in_features // parts)
            elif way == "colwise":
                shapes[id(layer.weight)] = (layer.out_features // parts, layer.in_features)
                if layer.bias is not None:
                    shapes[id(layer.bias)] = (layer.out_features // parts,)
    return shapes
