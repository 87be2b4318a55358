"""The folder of a run of pre-training: its files, what it was trained on, and from where it goes on."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.atomic import new_folder
from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.stream import reopen_data, resolve_source
from foldrank.hf.base import gathered
from foldrank.hf.checksums import write_checksums
from foldrank.recipes.reading import diff
from foldrank.recipes.schema import Recipe
from foldrank.train.checkpoints import checkpoints, run_of, step_of, verify
from foldrank.train.metrics import RunMetrics
from foldrank.train.output_folder import OutputFolder
from foldrank.train.schedule import GOES_ON, last_shared_step, longer, with_settings_of
from foldrank.train.sharding import is_spread

LEVELS = 3
"""How many folders above a checkpoint its run is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What `config.yaml` holds."""

    recipe: Recipe
    """The resolved settings."""
    id: str | None
    """Written into each checkpoint as well; None in runs of foldrank 0.1."""
    data: DataIdentity | None
    """What the run was trained on; None in runs of foldrank 0.1."""
    lineage: tuple[str, ...]
    """Where its weights come from, if not from a start of its own, in sentences, oldest first."""


class RunFolder(OutputFolder):
    """A run's folder, whether it is there or not."""

    config_name = "config.yaml"

    @property
    def unfolded(self) -> Path:
        """The trained weights."""
        return self.path / "unfolded"

    @property
    def folded(self) -> Path:
        """The deployed checkpoint, with its tokenizer."""
        return self.path / "folded"

    @property
    def evaluation_text(self) -> Path:
        """Of a run on a stream, the text that it is evaluated on."""
        return self.path / "evaluation.jsonl"

    def read_config(self) -> RunConfig:
        """The settings of the run, its id, and what it was trained on.

        Raises:
            ValueError: where the folder holds no run, or its config.yaml is damaged.
        """
        about, settings = self._read()
        if about is None:
            raise ValueError(f"{self.path} holds no run")
        try:
            data = about.get("data")
            identity = None if data is None else DataIdentity.from_dict(data)
            recipe = Recipe.from_dict(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.config} is damaged: {error}") from error
        lineage = tuple(map(str, about.get("lineage", ())))
        return RunConfig(recipe=recipe, id=about.get("id"), data=identity, lineage=lineage)

    def begin(
        self, recipe: Recipe, name: str, run_id: str, identity: DataIdentity, lineage: Sequence[str] = ()
    ) -> None:
        """Empties the folder of the run before, if there was one, and writes the settings.

        Raises:
            FileExistsError: as `check_free`.
            OSError: where it cannot be written.
        """
        self.empty()
        about = {"recipe": name, "id": run_id, "data": identity.to_dict(), "lineage": list(lineage)}
        self.write_config(about, recipe.to_dict())

    def go_on(self, recipe: Recipe, checkpoint: Path | None) -> None:
        """Notes the launch, and makes the run one of `recipe`, which may have another end: what came after `checkpoint`
        then goes.

        Raises:
            OSError: where it cannot be written.
        """
        self.note_launch()
        if checkpoint is None:
            return
        before = self.read_config()
        lineage = list(before.lineage)
        then = replace(before.recipe, train=with_settings_of(before.recipe.train, recipe.train))
        if diff(then, recipe):
            # In this order, so that the same command does it again where it is cut short.
            self.metrics.unlink(missing_ok=True)
            for later in checkpoints(self.checkpoints):
                if step_of(later) > step_of(checkpoint):
                    shutil.rmtree(later)
            lineage.append(longer(before.recipe.train, recipe.train, step_of(checkpoint)))
        if diff(before.recipe, recipe):
            about, _ = self._read()
            self.write_config({**(about or {}), "lineage": lineage}, recipe.to_dict())

    def find_checkpoint(self, recipe: Recipe, resume: bool | Path) -> Path | None:
        """The verified checkpoint from which the run goes on; None where it has none yet and starts again.

        Args:
            recipe: must be that of the run, but for its end (`schedule.GOES_ON`) where its schedule allows another.
            resume: a checkpoint of this run, whatever its folder is called; True: the newest.

        Raises:
            ValueError: where the folder holds no such run or a finished one, the recipe differs in more than an end
                that its schedule allows, or the checkpoint is damaged or of another run.
        """
        if not self.is_run():
            raise ValueError(f"{self.path} holds no run to go on with: leave out --resume to start one")
        config = self.read_config()
        last = self.last_step_shared_with(recipe)
        if last is None and self.metrics.exists():
            raise ValueError(f"the run in {self.path} is finished: nothing is left to do")
        if not isinstance(resume, Path):
            newest = self.newest_checkpoint(last)
            if newest is None and config.lineage:
                raise ValueError(
                    f"the run in {self.path} ended before its first checkpoint, and does not start by itself "
                    f"({config.lineage[-1]}): begin it again with --overwrite"
                )
            return newest
        return self.named_checkpoint(resume, last)

    def last_step_shared_with(self, recipe: Recipe) -> int | None:
        """The last step up to which the run is one of `recipe` as well; None where they are the same to the end.

        Raises:
            ValueError: where they differ in more than an end that the schedule allows.
        """
        then, now = (replace(each, data=resolve_source(each.data)) for each in (self.read_config().recipe, recipe))
        then = replace(then, train=with_settings_of(then.train, now.train))
        if not (changed := diff(then, now)):
            return None
        ends = tuple(f"train.{name} " for name in GOES_ON)
        if others := [line for line in changed if not line.startswith(ends)]:
            raise ValueError(f"the run in {self.path} was started with other settings: {'; '.join(others[:3])}")
        return last_shared_step(then.train, now.train)

    def named_checkpoint(self, checkpoint: Path, last: int | None) -> Path:
        """A checkpoint of the run by its folder, verified, where it is of no later step than `last`.

        Raises:
            ValueError: where it is damaged, of another run, or of a later step.
        """
        verify(checkpoint)
        inside = checkpoint.resolve().parent == self.checkpoints.resolve()
        if (owner := run_of(checkpoint)) != self.read_config().id or (owner is None and not inside):
            raise ValueError(
                f"{checkpoint} is a checkpoint of another run, not of that in {self.path}: name one of its own, or "
                "leave out the name to take the newest"
            )
        if last is not None and step_of(checkpoint) > last:
            raise ValueError(f"{checkpoint} is of step {step_of(checkpoint)}, and the two schedules part after {last}")
        return checkpoint

    def validation(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Dataset[dict[str, Tensor]]:
        """The validation sequences of the run, of exactly the text that it recorded.

        Args:
            tokenizer: of the checkpoint that is evaluated, which must be the run's.
            sequence_length: tokens a sequence.

        Raises:
            ValueError: where text or tokenizer are others now, naming both hashes.
        """
        config = self.read_config()
        train, identity = config.recipe.train, config.data
        if identity is None:
            # A run of foldrank 0.1 recorded the hash of its text in its metrics, and none of its tokenizer.
            then = RunMetrics.read(self.metrics).text_sha256 if self.metrics.exists() else None
            kind = "stream" if config.recipe.data.stream else "prepared"
            identity = DataIdentity(kind=kind, text_sha256=then, tokenizer_sha256=tokenizer_sha256(tokenizer))
        identity.check(replace(identity, tokenizer_sha256=tokenizer_sha256(tokenizer)))
        text = self.evaluation_text if self.evaluation_text.exists() else None
        data = reopen_data(config.recipe.data, identity, evaluation_text=text, tokenizer=tokenizer)
        return data.validation(replace(train.sequences, length=sequence_length), train.eval_tokens)

    def _what_it_holds(self) -> str:
        if not self.metrics.exists():
            saved = checkpoints(self.checkpoints)
            at = f"its newest checkpoint is of step {step_of(saved[-1])}" if saved else "it has no checkpoint yet"
            return f"{self.path} holds a run that did not finish, {at}: go on with --resume, or --overwrite it"
        try:
            metrics = RunMetrics.read(self.metrics)
            what = f"recipe {metrics.recipe}, seed {metrics.seed}, {metrics.steps} steps"
            if metrics.val_perplexity_folded is not None:
                what += f", validation perplexity {metrics.val_perplexity_folded:.2f}"
        except ValueError as error:
            what = f"its metrics.json is damaged: {error}"
        return (
            f"{self.path} holds a finished run ({what}): choose another folder with --out, or replace it with "
            "--overwrite"
        )


def find_run(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint lies in: the folder itself, or one above it; None where there is none."""
    resolved = checkpoint.resolve()
    candidates = [RunFolder(folder) for folder in (resolved, *resolved.parents)[: LEVELS + 1]]
    return next((run for run in candidates if run.is_run()), None)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in the Hugging Face format, whole or not at all, in place of an attempt before.

    Of a sharded model all processes must call; the first one gathers and writes it.

    Raises:
        OSError: where it cannot be written.
    """
    sharded = is_spread(model)
    how: dict[str, Any] = {"state_dict": gathered(model)} if sharded else {}
    if sharded and torch.distributed.get_rank() > 0:
        return
    try:
        with new_folder(folder, replace=True) as work:
            model.save_pretrained(work, **how)
            tokenizer.save_pretrained(work)
            write_checksums(work)
    except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
        raise OSError(f"{folder} was not written: {error}. With room for it, go on with --resume") from error
