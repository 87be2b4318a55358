"""What a run reads: tokenizer, training sequences in their order, validation and test."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.order import MixedDataset, ShuffledDataset
from foldrank.data.prepare import Progress
from foldrank.data.stream import PackedStream, StreamedData, open_data, reopen_data
from foldrank.hf.foreign import foreign
from foldrank.hf.tokenizers import load_tokenizer
from foldrank.recipes.schema import Recipe
from foldrank.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What a run reads."""

    identity: DataIdentity
    tokenizer: PreTrainedTokenizerBase
    training: ShuffledDataset | MixedDataset | PackedStream
    validation: Dataset[dict[str, Tensor]]
    test: Dataset[dict[str, Tensor]] | None
    stream: StreamedData | None

    def write_evaluation_text(self, file: Path, recipe: Recipe) -> None:
        """Of a stream, the text that it is evaluated on, so that a later evaluation needs no source."""
        if self.stream is not None:
            self.stream.write_evaluation_text(file, (recipe.train.eval_tokens or 0) + (recipe.train.test_tokens or 0))


def prepare_inputs(recipe: Recipe, run: RunFolder | None, checkpoint: Path | None, progress: Progress) -> RunInputs:
    """What the recipe trains on: where there is a run that it goes on with, exactly what that one has."""
    train, then = recipe.train, run.read_config().data if run else None
    if run is not None and then is not None:
        text = run.evaluation_text if run.evaluation_text.exists() else None
        data = reopen_data(recipe.data, then, evaluation_text=text, progress=progress)
    else:
        data = open_data(recipe.data, progress)
    tokenizer, identity = data.tokenizer(), data.identity()
    if checkpoint is not None and (checkpoint / "tokenizer_config.json").exists():
        # Of a run of foldrank 0.1 this is all that tells what it was trained on.
        replace(identity, tokenizer_sha256=tokenizer_sha256(load_tokenizer(checkpoint))).check(identity)
    with foreign(f"this tokenizer cannot read sample_prompt {recipe.sample_prompt!r}"):
        prompt = tokenizer(recipe.sample_prompt, add_special_tokens=False).input_ids
    if not prompt:
        raise ValueError(
            f"sample_prompt {recipe.sample_prompt!r} has no token that this tokenizer knows: give another "
            "(--sample_prompt), of numbers such as '17 4' where the data is token ids alone"
        )
    num_sequences = train.steps * train.batch_size
    test = None
    if train.test_tokens is not None and train.eval_tokens is not None:
        test = data.test(train.sequences, validation_tokens=train.eval_tokens, tokens=train.test_tokens)
    return RunInputs(
        identity=identity,
        tokenizer=tokenizer,
        training=data.training(train.sequences, seed=recipe.seed, num_sequences=num_sequences),
        validation=data.validation(train.sequences, train.eval_tokens),
        test=test,
        stream=data if isinstance(data, StreamedData) else None,
    )
