"""What `factorize_` did, as a table."""

from collections.abc import Mapping
from dataclasses import dataclass

from foldrank.core.formatting import abbreviate, table


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedLayer:
    """One layer that `factorize_` replaced."""

    name: str
    in_features: int
    out_features: int
    rank: int
    residual: bool
    params_before: int
    params_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorizeReport:
    """What `factorize_` did: layers converted, layers skipped with the reason, parameters of the model.

    Example:
        >>> import torch
        >>> from foldrank import LowRankConfig, factorize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        >>> report = factorize_(model, LowRankConfig(rank=2, targets=["0"]))
        >>> [layer.name for layer in report.converted], list(report.skipped)
        (['0'], ['1'])
    """

    converted: tuple[ConvertedLayer, ...]
    skipped: Mapping[str, str]
    """From the name of a linear layer that stayed dense to the reason."""
    params_before: int
    params_after: int

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.in_features} -> {layer.out_features}",
                str(layer.rank),
                "yes" if layer.residual else "no",
                f"{layer.params_before:,} -> {layer.params_after:,}",
            )
            for layer in self.converted
        ]
        rows += [(name, "dense", "", "", reason) for name, reason in self.skipped.items()]
        return table(("layer", "shape", "rank", "residual", "parameters"), rows) + "\n" + self.summary()

    def summary(self) -> str:
        """One line: how many layers, which were skipped, parameters before and after."""
        total = len(self.converted) + len(self.skipped)
        skipped = f", skipped {abbreviate(self.skipped)}" if self.skipped else ""
        return (
            f"converted {len(self.converted)} of {total} linear layers{skipped}; "
            f"{self.params_before:,} -> {self.params_after:,} parameters"
        )
