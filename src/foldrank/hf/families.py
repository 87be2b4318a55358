"""The architectures of transformers with low-rank classes, and how a further one gets them."""

import copy
import sys
from types import new_class
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)

from foldrank.core.config import LowRankConfig
from foldrank.core.inventory import low_rank_layers
from foldrank.hf.base import LowRankConfigMixin, LowRankModelMixin, refresh_config
from foldrank.hf.remote_code import FAMILIES, HEADS, Family
from foldrank.surgery.factorize import FactorizeReport, allow_saving_, factorize_

LOW_RANK_CLASSES: dict[type[PreTrainedModel], type[LowRankModelMixin]] = {}
"""From a class of transformers to its low-rank variant."""


def low_rank_classes(
    dense: type[PreTrainedModel], module: str
) -> tuple[type[LowRankConfigMixin], type[LowRankModelMixin], type[LowRankModelMixin]]:
    """The low-rank config, model and language model of an architecture, from now on known to the Auto classes.

    With them come the classes of its other heads that transformers has (classification of sequences and tokens,
    question answering), as attributes of the module that calls.

    Args:
        dense: the architecture's language model, such as `LlamaForCausalLM`.
        module: `__name__` of the module that calls. It must assign the classes to their names, `LowRank<Family>Config`,
            `LowRank<Family>Model` and `LowRank<Family>ForCausalLM`, under which they pickle.

    Raises:
        ValueError: for a class that is not the language model of its config, by transformers' own tables.

    Example:
        >>> LOW_RANK_CLASSES[LlamaForCausalLM].__name__  # what it gave for Llama
        'LowRankLlamaForCausalLM'
    """
    config_class: Any = dense.config_class
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if config_class not in MODEL_MAPPING or dense is not causal:
        hint = f"; give {causal.__name__}" if isinstance(causal, type) else ""
        raise ValueError(
            f"{dense.__name__} is no language model with a base model of its own that the Auto classes know{hint}"
        )
    base_class: Any = MODEL_MAPPING[config_class]
    known = {head: auto._model_mapping.get(config_class, None) for head, auto in HEADS.items()}
    heads: Any = {head: head_class for head, head_class in known.items() if isinstance(head_class, type)}
    family = Family(config=config_class, model=base_class, causal=dense, heads=heads)
    name = f"LowRank{family.name}"

    def define(kind: str, bases: tuple[type, ...], doc: str, **attributes: Any) -> Any:
        attributes |= {"__module__": module, "__doc__": doc}
        return new_class(name + kind, bases, exec_body=lambda namespace: namespace.update(attributes))

    config = define(
        "Config",
        (LowRankConfigMixin, family.config),
        f"A {family.name} config with `low_rank`: a `LowRankConfig` or its fields as plain values; None is dense.\n\n"
        f"    Example:\n        >>> {name}Config(low_rank={{'rank': 4}}).low_rank['rank']\n        4\n",
        model_type=family.model_type,
    )
    bases = {"Model": family.model, "ForCausalLM": family.causal, **heads}
    # One prefix for all: under its own, Llama's class for questions would find none of a language model's weights.
    shared = {"config_class": config, "base_model_prefix": dense.base_model_prefix}
    models = {
        kind: define(
            kind,
            (LowRankModelMixin, base),
            f"{base.__name__} with low-rank layers.\n\n"
            f"    Example:\n        >>> import torch\n        >>> with torch.device('meta'):\n"
            f"        ...     model = {name}{kind}({name}Config(num_hidden_layers=1, low_rank={{'rank': 4}}))\n"
            f"        >>> set(model.config.low_rank['rank'].values())\n        {{4}}\n",
            **shared,
        )
        for kind, base in bases.items()
    }
    FAMILIES[config] = family
    LOW_RANK_CLASSES.update({base: models[kind] for kind, base in bases.items()})
    AutoConfig.register(family.model_type, config, exist_ok=True)
    AutoModel.register(config, models["Model"], exist_ok=True)
    AutoModelForCausalLM.register(config, models["ForCausalLM"], exist_ok=True)
    for head in heads:
        HEADS[head].register(config, models[head], exist_ok=True)
        setattr(sys.modules[module], name + head, models[head])
    return config, models["Model"], models["ForCausalLM"]


def convert_(model: PreTrainedModel, config: LowRankConfig | None = None, **how: Any) -> FactorizeReport | None:
    """Gives a model of transformers, in place, the low-rank class of its family, so that it saves as a low-rank model.

    Args:
        model: a dense model, which `config` makes low-rank first; or one that `factorize_` has been at, with no config.
            It stays the same object, with the same parameters.
        config: as for `factorize_`.
        how: `init`, `sample` and `seed`, as for `factorize_`.

    Returns:
        The report of `factorize_`, where there is a config.

    Raises:
        ValueError: for an architecture without low-rank classes, a dense model without a config, and as `factorize_`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, num_hidden_layers=1))
        >>> report = convert_(model, LowRankConfig(rank=2))
        >>> type(model).__name__
        'LowRankLlamaForCausalLM'
    """
    low_rank_class = LOW_RANK_CLASSES.get(type(model))
    if isinstance(model, LowRankModelMixin):
        raise ValueError(f"the model is a {type(model).__name__} already: it saves as a low-rank model as it is")
    if low_rank_class is None:
        known = ", ".join(sorted(family.causal.__name__ for family in FAMILIES.values()))
        causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        hint = "" if causal is not type(model) else "; foldrank.hf.low_rank_classes makes them for this architecture"
        raise ValueError(
            f"{type(model).__name__} has no low-rank class; those with one are {known} and their classifiers{hint}"
        )
    if config is None and not low_rank_layers(model):
        raise ValueError("the model has no low-rank layer: give a config, or factorize_ it first")
    report = factorize_(model, config, **how) if config is not None else None
    dense_config = model.config
    low_rank_config: Any = copy.deepcopy(dense_config)  # it may be the config of other models too
    low_rank_config.__class__ = low_rank_class.config_class
    low_rank_config.low_rank = None
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = low_rank_config
    model.__class__ = low_rank_class
    allow_saving_(model)
    refresh_config(model)
    return report


LowRankLlamaConfig, LowRankLlamaModel, LowRankLlamaForCausalLM = low_rank_classes(LlamaForCausalLM, __name__)
LowRankMistralConfig, LowRankMistralModel, LowRankMistralForCausalLM = low_rank_classes(MistralForCausalLM, __name__)
LowRankQwen3Config, LowRankQwen3Model, LowRankQwen3ForCausalLM = low_rank_classes(Qwen3ForCausalLM, __name__)
LowRankGPT2Config, LowRankGPT2Model, LowRankGPT2ForCausalLM = low_rank_classes(GPT2LMHeadModel, __name__)
