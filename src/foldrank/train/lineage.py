"""Where a run begins, if not at a start of its own.

branch_from   a stable checkpoint of another run, with its optimizer, its place in the data and its random states:
              the run goes on as that one would have, to an end of its own
init_from     the weights of another run or checkpoint alone: step 0, data and settings of its own
"""

from dataclasses import dataclass
from pathlib import Path

from foldrank.recipes.schema import Recipe
from foldrank.train.checkpoints import run_of, step_of, verify
from foldrank.train.run_folder import RunFolder, find_run, longer


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
    if source.resolve() == run.path.resolve():
        checkpoint = run.newest_checkpoint(limit)
        assert checkpoint is not None  # it says why there is none
    else:
        checkpoint = source
        verify(checkpoint)
        if run_of(checkpoint) != config.id:
            raise ValueError(f"{checkpoint} is no checkpoint of the run in {run.path}")
        if step_of(checkpoint) > limit:
            raise ValueError(f"{checkpoint} is of step {step_of(checkpoint)}, and the two schedules part after {limit}")
    step = step_of(checkpoint)
    sentence = f"branched off the run {config.id} after step {step:,}: {longer(config.recipe, recipe, step)}"
    return Branch(run=run, checkpoint=checkpoint, lineage=(*config.lineage, sentence))
