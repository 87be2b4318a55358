"""The backbones by name: which layer a config's `backbone` means. A further one is a subclass and an entry here."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from foldrank.core.config import LowRankConfig
from foldrank.core.linear import LowRankLinear
from foldrank.surgery.sparse import SparseLowRankLinear

BACKBONES: dict[str, type[LowRankLinear]] = {"lowrank": LowRankLinear, "sltrain": SparseLowRankLinear}
"""From the name of a backbone to its class. An application adds its own: `BACKBONES["gated"] = GatedLinear`."""

CONNECTIONS: dict[str, Callable[[nn.Module, Collection[str]], Callable[[], None]]] = {}
"""What a backbone changes in a model besides its layers. Called with model and names of layers before anything is
replaced, to refuse what it does not fit; what it returns is called once the layers are in their places."""


def class_of(config: LowRankConfig) -> type[LowRankLinear]:
    """The class of a config's layers.

    Raises:
        ValueError: for an unknown backbone.
    """
    if config.backbone not in BACKBONES:
        raise ValueError(
            f"backbone must be one of {', '.join(BACKBONES)}, got {config.backbone!r} (one of your own joins "
            "foldrank.surgery.backbones.BACKBONES when its module is imported)"
        )
    return BACKBONES[config.backbone]


def build(config: LowRankConfig, in_features: int, out_features: int, rank: int, **others: Any) -> LowRankLinear:
    """The layer that `config` means at one place, with fresh weights; `others` as `LowRankLinear` takes them.

    Raises:
        ValueError: for an unknown backbone, an extra_config that it does not take, or what its class refuses.
    """
    kind = class_of(config)
    others = {"activation": config.activation, "scale": config.scale, **others, **config.extra_config}
    try:
        return kind(in_features, out_features, rank, **others)
    except TypeError as error:
        raise ValueError(f"extra_config of the backbone {config.backbone}: {error}") from error


def settings_of(layer: LowRankLinear) -> dict[str, Any]:
    """The fields of the `LowRankConfig` that `build` made `layer` from, besides its rank and residual.

    Raises:
        ValueError: where its class is no backbone with a name.
    """
    names = [name for name, backbone in BACKBONES.items() if type(layer) is backbone]
    if not names:
        raise ValueError(
            f"{type(layer).__name__} is no backbone with a name: enter it in foldrank.surgery.BACKBONES before the "
            "model is described or saved"
        )
    return {
        "backbone": names[0],
        "extra_config": layer.extra_config,
        "activation": layer.activation_name,
        "scale": layer.scale.start if layer.scale is not None else None,
    }
