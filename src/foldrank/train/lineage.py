"""Where a run begins, if not at a start of its own.

branch_from   a stable checkpoint of another run, with its optimizer, its place in the data and its random states:
              the run goes on as that one would have, to an end of its own
init_from     the weights of another run or checkpoint alone: step 0, data and settings of its own
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.data.identity import tokenizer_sha256
from foldrank.hf.checkpoint import inspect, load, read_config
from foldrank.hf.checksums import read_checksums
from foldrank.recipes.schema import Recipe
from foldrank.surgery.approximation import approximate_, set_effective_
from foldrank.train.architecture import dense_config
from foldrank.train.checkpoints import step_of
from foldrank.train.run_folder import RunFolder, find_run
from foldrank.train.schedule import longer

SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "activation_function", "rms_norm_eps", "layer_norm_epsilon"),
    *("rope_parameters", "attention_bias", "mlp_bias"),
)
"""Fields of an architecture with another value of which the same weights compute something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A run that goes on from a checkpoint of another."""

    run: RunFolder
    """The other run."""
    checkpoint: Path
    lineage: tuple[str, ...]


def branch(source: Path, recipe: Recipe, out: Path, *, resume: bool = False) -> Branch:
    """The checkpoint of a run from which one of `recipe` branches off.

    Args:
        source: the folder of a run, whose newest checkpoint that both share is taken, or one of its checkpoints.
        recipe: that of the run but for its end (`schedule.GOES_ON`).
        out: the folder of the new run.
        resume: whether the new run is to go on, which is something else.

    Raises:
        ValueError: where `source` is none of these, is damaged or lies in `out`, or the recipe differs in more than its
            end.
    """
    if resume:
        raise ValueError(
            "--resume goes on with the run in a folder, --branch-from begins one in a new folder: give one"
        )
    run = find_run(source)
    if run is None:
        raise ValueError(
            f"{source} is no run and lies in none: --branch-from takes a run's folder or a checkpoint in it"
        )
    if run.path.resolve() == out.resolve():
        raise ValueError(f"the run that branches off {run.path} needs a folder of its own: choose one with --out")
    config = run.read_config()
    last = run.last_step_shared_with(recipe)
    limit = recipe.train.steps - 1 if last is None else last
    whole = source.resolve() == run.path.resolve()
    checkpoint = run.newest_checkpoint(limit) if whole else run.named_checkpoint(source, limit)
    assert checkpoint is not None  # it says why there is none
    step = step_of(checkpoint)
    sentence = (
        f"branched off the run {config.id} after step {step:,}: {longer(config.recipe.train, recipe.train, step)}"
    )
    return Branch(run=run, checkpoint=checkpoint, lineage=(*config.lineage, sentence))


def check_initial(source: Path, recipe: Recipe, *, alone: bool) -> None:
    """Refuses a checkpoint from which a run of `recipe` cannot begin, as far as its files tell, before any slow work.

    Args:
        source: a run's folder, or a checkpoint.
        recipe: of the run that is to begin.
        alone: whether the run has no other beginning, such as a run that it goes on with.

    Raises:
        ValueError: saying what does not fit.
    """
    if not alone:
        raise ValueError("--init-from begins a run at step 0: it goes with neither --resume nor --branch-from")
    if recipe.train.ablation is not None:
        raise ValueError("--init-from begins with weights that are there, and train.ablation draws them: give one")
    folder = _folder_of(source)
    info, ours, theirs = inspect(folder), dense_config(recipe), read_config(folder)
    for field in SAME:
        one, other = getattr(ours, field, None), getattr(theirs, field, None)
        if field == "model_type":
            other = str(other).removeprefix("lowrank_")
        if one != other:
            raise ValueError(f"{folder} has {field} {other}, and the recipe {one}: they must be one")
    if ours.tie_word_embeddings and not theirs.tie_word_embeddings:
        raise ValueError(f"{folder} has a head of its own, and the recipe ties it to the embedding")
    low_rank = recipe.low_rank
    other = "" if low_rank is None else low_rank.activation or low_rank.backbone
    if info.low_rank is None and other not in ("", "lowrank"):
        raise ValueError(
            f"{folder} is dense, and no factors approximate a dense weight with {other}: take plain low rank "
            "(--low_rank.activation null --low_rank.backbone lowrank), or of an activation what foldrank factorize "
            "--activation makes of it"
        )


def _folder_of(source: Path) -> Path:
    """The checkpoint that a run's folder stands for: its trained weights; any other folder stands for itself."""
    run = RunFolder(source)
    if run.is_run() and not run.metrics.exists():
        raise ValueError(
            f"the run in {source} is not finished: finish it with --resume, or take one of its checkpoints"
        )
    return run.unfolded if run.is_run() else source


@torch.no_grad()
def initialize_(model: PreTrainedModel, source: Path, tokenizer_hash: str, *, seed: int) -> tuple[str, ...]:
    """Gives a model the weights of a checkpoint, in place, so that it computes the same as far as its ranks allow.

    Layers of equal form take the factors, B* as it is with its residual or scale; low-rank ones of another rank, and
    those that stand for dense ones, the best approximation of the weight (`surgery/approximation.py`); dense ones the
    product of the factors.

    Args:
        model: of the same family and shape, but for what is low-rank.
        source: a run's folder, whose trained weights are taken, or a checkpoint.
        tokenizer_hash: of the tokenizer with which the model will be trained, which must be the checkpoint's.
        seed: of the approximation of large weights.

    Returns:
        The lineage of a run that begins so.

    Raises:
        ValueError: where `source` is none of these or damaged, or its weights do not fit.
    """
    run, folder = RunFolder(source), _folder_of(source)
    of_run = run.read_config() if run.is_run() else None
    before, tokenizer = load(folder)
    before.float()
    then = tokenizer_sha256(tokenizer)
    if then != tokenizer_hash:
        raise ValueError(
            f"the tokenizer of {folder} is not the one of the data (sha256 {then[:12]} and {tokenizer_hash[:12]}): "
            f"give it with --data.tokenizer {folder}"
        )
    approximated = _take_weights_(model, before, folder, seed)
    how = f", {approximated} of its weights approximated at low rank" if approximated else ""
    name = f"the run {of_run.id}" if of_run is not None else f"the checkpoint {source}"
    digest = read_checksums(folder) or {}
    weights = next((value[:12] for file, value in sorted(digest.items()) if file.endswith(".safetensors")), None)
    sentence = f"began with the weights of {name}{f' (sha256 {weights})' if weights else ''}{how}"
    return (*(of_run.lineage if of_run is not None else ()), sentence)


def _take_weights_(model: PreTrainedModel, before: PreTrainedModel, folder: Path, seed: int) -> int:
    """Every parameter of `model` from `before`; the number of weights that were approximated."""
    theirs = dict(before.named_modules())
    layers, approximated, taken = low_rank_layers(model), 0, set()
    for name, layer in layers.items():
        source = theirs.get(name)
        if isinstance(source, LowRankLinear) and _alike(source, layer):
            set_effective_(layer, source.effective_weight(source.up.weight))
            done = {
                "up.weight",
                *(f"{part.kind}.{key}" for part in layer.weight_parametrizations for key in part.state_dict()),
            }
            rest = {key: value for key, value in source.state_dict().items() if key in layer.state_dict()}
            layer.load_state_dict({**layer.state_dict(), **{k: v for k, v in rest.items() if k not in done}})
        elif source is not None and (whole := _whole(source)) is not None:
            if (layer.out_features, layer.in_features) != tuple(whole[0].shape):
                raise ValueError(f"{name} of {folder} has another shape: {tuple(whole[0].shape)}")
            approximate_(layer, *whole, seed=seed)
            approximated += 1
        else:
            raise ValueError(f"{name} of {folder} cannot be brought into the form that the recipe asks for")
        taken.update(f"{name}.{key}" for key in layer.state_dict())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in taken:
            continue
        holder, _, attribute = name.rpartition(".")
        source, value = theirs.get(holder), None
        if source is not None and attribute in ("weight", "bias") and isinstance(source, LowRankLinear):
            whole = _whole(source)
            value = None if whole is None else whole[0] if attribute == "weight" else whole[1]
        elif source is not None:
            value = source.state_dict().get(attribute)
        if value is None or value.shape != tensor.shape:
            there = "is not there" if value is None else f"has the shape {tuple(value.shape)}"
            raise ValueError(
                f"{folder} does not fit the recipe: {name} {there}, and {tuple(tensor.shape)} is asked for"
            )
        tensor.data.copy_(value)
    return approximated


def _alike(source: LowRankLinear, layer: LowRankLinear) -> bool:
    """Whether both compute with factors of one form."""
    return (type(source), source.rank, source.activation_name, source.in_features, source.out_features) == (
        type(layer),
        layer.rank,
        layer.activation_name,
        layer.in_features,
        layer.out_features,
    )


def _whole(source: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias by which a layer multiplies; None where it does more than that."""
    if isinstance(source, nn.Linear):
        return source.weight, source.bias
    if type(source) is LowRankLinear and source.activation is None:
        return source.effective_weight(source.up.weight) @ source.down.weight, source.up.bias
    return None
