"""Training from a stream: the same sequences in every run, on any number of processes, after any resume."""

import json
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from foldrank.cli import main
from foldrank.data.config import DataConfig, SequenceFormat
from foldrank.data.corpus import documents
from foldrank.data.sequences import IGNORED
from foldrank.data.stream import PackedStream, encode, open_data
from foldrank.data.tokenizer import Encoder
from tests.data.texts import some_texts, write_folder

LENGTH = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> DataConfig:
    source = write_folder(tmp_path_factory.mktemp("texts"), some_texts(60))
    return DataConfig(source=str(source), tokenizer=str(tokenizer_folder), validation_fraction=0.2, stream=True)


def stream(config: DataConfig, num_sequences: int) -> PackedStream:
    data = open_data(config).training(
        SequenceFormat(length=LENGTH, layout="packed"), seed=0, num_sequences=num_sequences
    )
    assert isinstance(data, PackedStream)
    return data


def ids_of(config: DataConfig, split: str) -> list[int]:
    encoder = Encoder(AutoTokenizer.from_pretrained(config.tokenizer))
    texts = [document.text for document in documents(config) if document.split == split]
    return list(chain.from_iterable(ids.tolist() for ids in encoder(texts)))


def test_stream_is_the_training_documents_packed_and_begins_again(config: DataConfig) -> None:
    ids = ids_of(config, "train")
    whole = ids + ids
    count = len(whole) // LENGTH
    assert count > len(ids) // LENGTH
    found = [item["input_ids"].tolist() for item in stream(config, count)]
    assert found == [whole[at : at + LENGTH] for at in range(0, count * LENGTH, LENGTH)]


def test_workers(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [item["input_ids"].tolist() for item in stream(config, 20)]
    loader = DataLoader(stream(config, 20), batch_size=4, num_workers=1)
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == expected
    with monkeypatch.context() as two:
        two.setattr("foldrank.data.stream.get_worker_info", lambda: SimpleNamespace(num_workers=2))
        with pytest.raises(ValueError, match="one loader worker at most"):
            next(iter(stream(config, 20)))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_step_has_the_same_sequences_for_any_number_of_processes(config: DataConfig, processes: int) -> None:
    expected = [item["input_ids"].tolist() for item in stream(config, 24)]
    shares = [
        [
            item["input_ids"].tolist()
            for item in IterableDatasetShard(
                stream(config, 24), batch_size=8 // processes, num_processes=processes, process_index=rank
            )
        ]
        for rank in range(processes)
    ]
    each = 8 // processes
    for step in range(3):
        together = chain.from_iterable(share[step * each : (step + 1) * each] for share in shares)
        assert sorted(together) == sorted(expected[step * 8 : (step + 1) * 8])


def test_going_on_is_dropping_what_was_used(config: DataConfig) -> None:
    expected = [item["input_ids"].tolist() for item in stream(config, 20)]
    assert [item["input_ids"].tolist() for item in islice(stream(config, 20), 7, None)] == expected[7:]


def test_validation_is_the_first_held_out_documents(config: DataConfig) -> None:
    held_out = ids_of(config, "validation")
    found = open_data(config).validation(SequenceFormat(length=LENGTH), 5 * LENGTH)
    assert [found[index]["input_ids"].tolist() for index in range(5)] == [
        held_out[at : at + LENGTH] for at in range(0, 5 * LENGTH, LENGTH)
    ]
    assert len(found) == 5  # pyright: ignore[reportArgumentType]


def test_encode_is_all_of_a_source(config: DataConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    found = encode(config, tokenizer, LENGTH)
    ids = [token for document in documents(config) for token in Encoder(tokenizer)([document.text])[0].tolist()]
    blocks = [found[index] for index in range(len(found))]
    predicted = [token for block in blocks for token in block["labels"].tolist()[1:] if token != IGNORED]
    assert predicted == ids[1:]
    seen = [token for block in blocks for token in block["input_ids"].tolist()[:-1]]
    assert seen[: len(predicted)] == ids[:-1]


def test_what_a_stream_cannot_do(config: DataConfig) -> None:
    data = open_data(config)
    with pytest.raises(ValueError, match="a stream needs a tokenizer"):
        DataConfig(stream=True)
    with pytest.raises(ValueError, match="a stream is packed"):
        data.training(SequenceFormat(length=LENGTH, layout="padded"), seed=0, num_sequences=1)
    with pytest.raises(ValueError, match=r"needs a number of tokens \(train.eval_tokens\)"):
        data.validation(SequenceFormat(length=LENGTH), None)
    with pytest.raises(ValueError, match="holds no training sequence of 100000 tokens"):
        next(iter(open_data(config).training(SequenceFormat(length=100_000, layout="packed"), seed=0, num_sequences=1)))  # pyright: ignore[reportArgumentType]


def test_pretrain_from_a_stream(config: DataConfig, tmp_path: Path) -> None:
    settings = {
        "data.source": config.source,
        "data.tokenizer": config.tokenizer,
        "data.stream": True,
        "data.validation_fraction": 0.2,
        "model.hidden_size": 16,
        "model.intermediate_size": 16,
        "model.num_layers": 1,
        "low_rank.rank": 4,
        "train.sequence_length": LENGTH,
        "train.batch_size": 2,
        "train.eval_tokens": 64,
        "train.steps": 3,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["pretrain", "demo", *arguments, "--out", str(tmp_path / "run"), "--json"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["tokens"] == 3 * 2 * LENGTH
    assert metrics["train_tokens_available"] is None
