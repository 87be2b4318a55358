"""A training step of the whole model: forward, backward, AdamW."""

from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.subjects import TrainedModel, fold_gates, otherwise_gates, start_gates
from foldrank.bench.turns import WARM_UP, in_turns, timed
from foldrank.train.accounting import training_flops
from foldrank.tree import count_parameters


def run(settings: Settings) -> Findings:
    """Steps every method's model in turns.

    Raises:
        ValueError: where the numerics gate fails.
    """
    gates = fold_gates(settings) + otherwise_gates(settings)
    subjects = {method: TrainedModel(settings, method) for method in settings.subjects}
    for subject in subjects.values():
        for _ in range(WARM_UP):
            subject.step()
    gates += start_gates(settings, subjects)
    turns = {method: timed(subject.step, settings.device) for method, subject in subjects.items()}
    figures = in_turns(turns, settings.rounds, profile=settings.profile)
    for method, subject in subjects.items():
        flops = training_flops(subject.model, subject.recipe.train).total
        speed = subject.tokens / figures[method]["seconds"]
        figures[method] |= {
            "parameters": count_parameters(subject.model),
            "tokens_per_second": speed,
            "flops_per_token": flops,
            "mfu": None if settings.peak_flops is None else flops * speed / settings.peak_flops,
        }
    return Findings(cases={"step": figures}, gates=tuple(gates))
