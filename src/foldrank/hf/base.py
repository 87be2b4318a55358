"""What makes any transformers architecture low-rank: mixins for its config and its models.

The modules of a model are the truth. Its config's `low_rank` is refreshed from them whenever the model is saved, so a
model that was folded in place saves as a folded checkpoint.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from foldrank.config import LowRankConfig
from foldrank.fold import unfolded_keys
from foldrank.foldable import SPEC
from foldrank.surgery import describe, factorize_
from foldrank.tree import low_rank_layers

HERE = Path(__file__).parent


class LowRankConfigMixin(PreTrainedConfig):
    """Adds `low_rank` to a transformers config: a `LowRankConfig` as plain values, or None for a dense model."""

    low_rank: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Subclassed configs are not type-checked by transformers: a wrong field must not wait for the model.
        if isinstance(self.low_rank, LowRankConfig):
            self.low_rank = self.low_rank.to_dict()
        elif self.low_rank is not None:
            LowRankConfig.from_dict(self.low_rank)
        super().__post_init__(**kwargs)


class LowRankModelMixin(PreTrainedModel):
    """Adds low-rank layers to a transformers model: built from `config.low_rank`, saved with it.

    The dense model is drawn first and its targeted layers are then replaced, so that with one seed all other
    parameters start equal whatever the method.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.low_rank is not None:
            factorize_(self, LowRankConfig.from_dict(config.low_rank))
            refresh_config(self)
            for layer in low_rank_layers(self).values():
                for module in layer.modules():
                    # transformers' mark for what is drawn: without it init_weights() would draw the factors with 0.02.
                    setattr(module, "_is_hf_initialized", True)  # noqa: B010 - pyright knows no such attribute

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fill the whole model is an error.

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
        """As in transformers; a folded model also saves the modelling file with which it loads without foldrank."""
        folded = refresh_config(self)
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if folded and is_main_process:
            source = modeling_file(type(self.config))
            shutil.copyfile(source, Path(save_directory) / source.name)


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuses a model that its checkpoint did not fill, given what `from_pretrained` says of the loading.

    Raises:
        ValueError: for missing tensors, wrong shapes, and where config and weights disagree about the residual.
    """
    missing, mismatched = set(info["missing_keys"]), {entry[0] for entry in info["mismatched_keys"]}
    parts = {
        f"{name}.{part.kind}.{SPEC}": part for name, layer in low_rank_layers(model).items() for part in layer.maps
    }
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


def refresh_config(model: PreTrainedModel) -> bool:
    """Writes the low-rank layers of `model` as they are into its config; whether it is free of residuals."""
    low_rank = describe(model)
    if low_rank is None:
        model.config.low_rank = None
        return False
    fields = low_rank.to_dict()
    prefix = model.base_model_prefix + "."
    # Names count from the base model, so that the config fits the model with and without its head.
    for table, key in ((fields, "rank"), (fields["residual"], "alpha")):
        if table is not None and isinstance(table[key], dict):
            table[key] = {name.removeprefix(prefix): value for name, value in table[key].items()}
    model.config.low_rank = fields
    folded = low_rank.residual is None
    if folded:
        model.config.auto_map = auto_map(type(model.config))
    else:
        vars(model.config).pop("auto_map", None)
    return folded


def family(config_class: type[PreTrainedConfig]) -> str:
    """Llama, from LowRankLlamaConfig."""
    return config_class.__name__.removeprefix("LowRank").removesuffix("Config")


def modeling_file(config_class: type[PreTrainedConfig]) -> Path:
    """The self-contained modelling file that travels with folded checkpoints of this architecture."""
    return HERE / f"modeling_lowrank_{family(config_class).lower()}.py"


def auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Where transformers finds the classes in the modelling file."""
    module, name = modeling_file(config_class).stem, "LowRank" + family(config_class)
    return {
        "AutoConfig": f"{module}.{name}Config",
        "AutoModel": f"{module}.{name}Model",
        "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
    }


def register(
    config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], causal_class: type[PreTrainedModel]
) -> None:
    """Makes the Auto classes of this process know an architecture."""
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForCausalLM.register(config_class, causal_class)
