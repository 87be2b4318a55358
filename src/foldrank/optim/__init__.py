"""Optimizers for factors: one `torch.optim.Optimizer` outside, a rule for each group of parameters inside.

    newton_schulz.py (the nearest orthogonal matrix, about) -> rules.py (adamw, muon, spectron: a step of a group each)
      -> factor_optimizer.py (which parameters go by which rule, and the optimizer)

Needs torch alone. `factor_optimizer(model, "muon", lr=0.006)` is how a loop of one's own begins.
"""

from foldrank.optim.factor_optimizer import OPTIMIZERS, FactorOptimizer, factor_optimizer
from foldrank.optim.newton_schulz import newton_schulz

__all__ = ["OPTIMIZERS", "FactorOptimizer", "factor_optimizer", "newton_schulz"]
