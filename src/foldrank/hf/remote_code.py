"""What lets a folded checkpoint load without foldrank: a modelling file, written for Llama, named for each family.

An unfolded checkpoint has it too, which then says what to do instead of a library's guess.

CR-Net has a second one, for Llama alone, which imports the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from foldrank.hf import modeling_crnet_llama as crnet
from foldrank.hf import modeling_lowrank_llama as template


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """An architecture of transformers of which foldrank has low-rank classes."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal: type[PreTrainedModel]
    heads: Mapping[str, type[PreTrainedModel]]
    """Other heads that transformers has for it, by the ending of their name: ForSequenceClassification and the like."""

    @property
    def name(self) -> str:
        """Llama, from LlamaConfig."""
        return self.config.__name__.removesuffix("Config")

    @property
    def model_type(self) -> str:
        """What `config.json` calls the low-rank variant."""
        return f"lowrank_{self.config.model_type}"

    @property
    def modeling(self) -> str:
        """The name of the modelling file, without its suffix."""
        return f"modeling_{self.model_type}"


HEADS: dict[str, Any] = {head: getattr(transformers, f"AutoModel{head}") for head in template.HEADS}
"""From the ending of a class's name to the Auto class that finds it."""

_CRNET = Path(crnet.__file__).stem

FAMILIES: dict[type[PreTrainedConfig], Family] = {}
"""From each low-rank config class to its family; `low_rank_classes` fills it."""


def refer_to_modeling(config: Any) -> None:
    """Sets a config's `auto_map` to the modelling files; takes it away where they know no such model.

    Args:
        config: of a low-rank class, its `low_rank` that of the model.
    """
    vars(config).pop("auto_map", None)
    if config.low_rank is not None and config.low_rank["backbone"] in template.BACKBONES:
        config.auto_map = auto_map(config, config.low_rank)


def auto_map(config: PreTrainedConfig, low_rank: Mapping[str, Any]) -> dict[str, str]:
    """Where transformers finds the classes of a config and a model of this `LowRankConfig` in the modelling files."""
    family = FAMILIES[type(config)]
    models = _CRNET if low_rank["backbone"] == "crnet" else family.modeling
    return {
        "AutoConfig": f"{models}.LowRank{family.name}Config",
        "AutoModel": f"{models}.LowRank{family.name}Model",
        "AutoModelForCausalLM": f"{models}.LowRank{family.name}ForCausalLM",
        **{HEADS[head].__name__: f"{models}.LowRank{family.name}{head}" for head in family.heads},
    }


def modeling_source(config_class: type[PreTrainedConfig]) -> str:
    """The modelling file of a family: Llama's, with the names of this one."""
    family = FAMILIES[config_class]
    source = (
        Path(template.__file__).read_text().replace("lowrank_llama", family.model_type).replace("Llama", family.name)
    )
    for dense, suffix in ((family.config, "Config"), (family.model, "Model"), (family.causal, "ForCausalLM")):
        written = f"from transformers import {family.name}{suffix} as Dense{suffix}"
        assert written in source
        home = "transformers" if getattr(transformers, dense.__name__, None) is dense else dense.__module__
        source = source.replace(written, f"from {home} import {dense.__name__} as Dense{suffix}")
    return source


def write_modeling(config: PreTrainedConfig, low_rank: Mapping[str, Any], folder: Path) -> None:
    """Writes beside a checkpoint the modelling files that its `auto_map` names."""
    (folder / f"{FAMILIES[type(config)].modeling}.py").write_text(modeling_source(type(config)))
    if low_rank["backbone"] == "crnet":
        (folder / f"{_CRNET}.py").write_text(Path(crnet.__file__).read_text())
