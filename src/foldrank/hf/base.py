"""What makes any transformers architecture low-rank: mixins for its config and its models.

The modules of a model are the truth. Its config's `low_rank` is refreshed from them whenever the model is saved, so a
model that was folded in place saves as a folded checkpoint.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from foldrank.core.config import LowRankConfig, is_name
from foldrank.core.dtensor import full_tensor, is_dtensor
from foldrank.core.fold import unfolded_keys
from foldrank.core.inventory import inventory, low_rank_layers
from foldrank.core.parametrization import SPEC
from foldrank.hf.modeling_lowrank_llama import tensor_parallel_plan
from foldrank.hf.remote_code import HEADS, refer_to_modeling, write_modeling
from foldrank.surgery.factorize import allow_saving_, describe, factorize_


class LowRankConfigMixin(PreTrainedConfig):
    """Adds `low_rank` to a transformers config: a `LowRankConfig` as plain values, or None for a dense model."""

    low_rank: dict | None = None

    @property
    def base_model_tp_plan(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How servers split the model over ranks, by names of modules; None where it cannot be split."""
        return tensor_parallel_plan(super().base_model_tp_plan, self.low_rank, self.num_hidden_layers)

    @property
    def tp_plan_without_residual(self) -> dict[str, str] | None:
        """The plan of the model once its residuals are folded, which is when it can be split."""
        low_rank = self.low_rank and {**self.low_rank, "residual": None}
        return tensor_parallel_plan(super().base_model_tp_plan, low_rank, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As in transformers; of a file, `low_rank` names each layer, and no pattern is compiled.

        Raises:
            ValueError: for low-rank settings that no model was saved with.
        """
        check_saved(low_rank := config_dict.get("low_rank"))
        if low_rank is not None:
            # What foldrank 0.1 left there of a recipe's patterns means nothing beside the names.
            config_dict = {**config_dict, "low_rank": {**low_rank, "exclude": (), "targets": None}}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        # Subclassed configs are not type-checked by transformers: a wrong field must not wait for the model.
        low_rank: Any = self.low_rank
        if low_rank is not None and not isinstance(low_rank, LowRankConfig):
            low_rank = LowRankConfig.from_dict(low_rank)
        self.low_rank = low_rank and low_rank.to_dict()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; beside the config go the modelling files that its `auto_map` names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.low_rank is not None and getattr(self, "auto_map", None) is not None:
            write_modeling(self, self.low_rank, Path(save_directory))


class LowRankModelMixin(PreTrainedModel):
    """Adds low-rank layers to a transformers model: built from `config.low_rank`, saved with it.

    The dense model is drawn first and its targeted layers are then replaced, so that with one seed all other
    parameters start equal whatever the method.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Under the heads of transformers the base model is a low-rank one already.
        if config.low_rank is not None and not low_rank_layers(self):
            factorize_(self, _by_full_names(self, LowRankConfig.from_dict(config.low_rank)))
            allow_saving_(self)
            refresh_config(self)
            for layer in low_rank_layers(self).values():
                for module in layer.modules():
                    # transformers' mark for what is drawn: without it init_weights() would draw the factors with 0.02.
                    setattr(module, "_is_hf_initialized", True)  # noqa: B010 - pyright knows no such attribute

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fill the whole model is an error.

        A new head on a checkpoint that was saved with another one, as to fine-tune it to classify, starts as drawn.

        Raises:
            ValueError: for missing tensors, and where a folded checkpoint met an unfolded model or the reverse.
        """
        # Mismatched shapes are let through here because transformers would say only that there are some.
        kwargs["ignore_mismatched_sizes"] = True
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_loaded(*loaded)
        return loaded if output_loading_info else loaded[0]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; with the modelling files by which a folded model loads without foldrank.

        A model that FSDP2 sharded is gathered: all its processes must call, and the first one saves.
        """
        refresh_config(self)
        by_transformers = getattr(self.config, "distributed_config", None) is not None
        if not by_transformers and "state_dict" not in kwargs and any(map(is_dtensor, self.parameters())):
            kwargs["state_dict"] = gathered(self)
            if torch.distributed.get_rank() > 0:
                return
        super().save_pretrained(save_directory, is_main_process, **kwargs)


def distinct_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict, each once, where several names have one."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor.detach()))
    return dict(named.values())


def gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights of a sharded model on the CPU of the first process, which alone holds them; all must call."""
    first, weights = torch.distributed.get_rank() == 0, {}
    for name, value in distinct_weights(model).items():
        whole = full_tensor(value)
        if first:
            weights[name] = whole.cpu()
    return weights


def save_description(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights: configs, and the modelling file that travels along."""
    if isinstance(model, LowRankModelMixin):
        refresh_config(model)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def check_saved(low_rank: Any) -> None:
    """Refuses `low_rank` of a config that is read from a file, where it is not as a model is saved.

    Raises:
        ValueError: naming what is wrong.
    """
    if low_rank is None:
        return
    if not isinstance(low_rank, dict):
        raise ValueError(f"low_rank must hold settings by name, got {type(low_rank).__name__}")
    residual = low_rank.get("residual") or {}
    tables = {"rank": low_rank.get("rank")}
    if isinstance(residual, dict) and isinstance(residual.get("alpha"), dict):
        tables["residual.alpha"] = residual["alpha"]
    for field, table in tables.items():
        if not isinstance(table, dict) or not table:
            raise ValueError(f"low_rank.{field} must be a table from each layer's name to its value, got {table!r}")
        for name in table:
            if not is_name(str(name)):
                raise ValueError(f"low_rank.{field} names {name!r}, which is no name of a layer")


def _is_new_head(model: PreTrainedModel) -> bool:
    """Whether a model classifies or the like, and its checkpoint was saved with another head."""
    name = type(model).__name__
    return name.endswith(tuple(HEADS)) and name not in (model.config.architectures or ())


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuses a model that its checkpoint did not fill, given what `from_pretrained` says of the loading.

    Args:
        model: as loaded.
        info: `missing_keys`, `unexpected_keys` and `mismatched_keys`.

    Raises:
        ValueError: for missing tensors, wrong shapes, and where config and weights disagree about the residual.
    """
    missing, mismatched = set(info["missing_keys"]), {entry[0] for entry in info["mismatched_keys"]}
    parts = {
        f"{name}.{part.kind}.{SPEC}": part
        for name, layer in low_rank_layers(model).items()
        for part in layer.weight_parametrizations
    }
    if _is_new_head(model):  # which starts as it was drawn
        missing = {key for key in missing if key.startswith(model.base_model_prefix + ".")}
    if parts and missing >= parts.keys():
        kinds = " and a ".join(sorted({part.kind for part in parts.values()}))
        raise ValueError(f"the checkpoint is folded but its config has a {kinds}, which would be applied again")
    if unfolded := unfolded_keys(info["unexpected_keys"]):
        kinds = " or ".join(sorted({key.split(".")[-2] for key in unfolded}))
        raise ValueError(f"the checkpoint is not folded but its config has no {kinds}: fold it (foldrank fold)")
    for key, part in parts.items():
        if key in mismatched or (key not in missing and part.decode(part.spec) != part.spec_fields()):
            raise ValueError(
                f"{key} is of another {part.kind} than the config's ({part.spec_fields()}): restore the config.json "
                "that was saved with these weights"
            )
    if mismatched:
        raise ValueError(
            f"the checkpoint does not fit its config: {len(mismatched)} tensors are of another shape, e.g. "
            f"{min(mismatched)}"
        )
    if missing:
        raise ValueError(
            f"not a whole checkpoint of a {type(model).__name__}: {len(missing)} tensors are missing, "
            f"e.g. {min(missing)}"
        )


def _by_full_names(model: PreTrainedModel, config: LowRankConfig) -> LowRankConfig:
    """The config of a saved model for this one: its names count from the base model, which may lie in `model`."""
    names, prefix = inventory(model).linear_specs, model.base_model_prefix + "."

    def full(table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        return {prefix + name if prefix + name in names else name: value for name, value in table.items()}

    residual = config.residual and replace(config.residual, alpha=full(config.residual.alpha))
    return replace(config, rank=full(config.rank), residual=residual)


def refresh_config(model: PreTrainedModel) -> None:
    """Writes the low-rank layers of `model` as they are into its config, and where its classes are found."""
    low_rank = describe(model)
    fields = low_rank and low_rank.to_dict()
    if fields is not None:
        prefix = model.base_model_prefix + "."
        # Names count from the base model, so that the config fits the model with and without its head.
        for table, key in ((fields, "rank"), (fields["residual"], "alpha")):
            if table is not None and isinstance(table[key], dict):
                table[key] = {name.removeprefix(prefix): value for name, value in table[key].items()}
    model.config.low_rank = fields
    refer_to_modeling(model.config)
