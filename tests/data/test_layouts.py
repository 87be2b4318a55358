"""The two layouts against their definition, and the order of training as a function of the seed alone."""

import pickle
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from tokenizers.processors import TemplateProcessing
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foldrank.data import shards
from foldrank.data.config import DataConfig, Layout, SequenceFormat
from foldrank.data.corpus import documents
from foldrank.data.order import ShuffledDataset
from foldrank.data.prepare import prepare
from foldrank.data.prepared import PreparedData
from foldrank.data.sequences import IGNORED, SequenceDataset
from foldrank.data.tokenizer import Encoder
from foldrank.hf.tokenizers import end_token
from foldrank.train.evaluate import evaluate_loss
from tests.data.texts import some_texts, write_folder

LAYOUTS: tuple[Layout, ...] = ("packed", "best-fit", "padded")
LENGTH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> PreparedData:
    """Documents shorter and longer than `LENGTH`, in several shards."""
    folder = tmp_path_factory.mktemp("layouts")
    source = write_folder(folder / "texts", [*some_texts(40, words=(2, 6)), *some_texts(40, seed=1)])
    config = DataConfig(source=str(source), tokenizer=str(tokenizer_folder), validation_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRANK_CACHE", str(folder / "cache"))
        patch.setattr(shards, "SHARD_TOKENS", 1000)
        return prepare(config, folder / "prepared")


@pytest.fixture(scope="module")
def training_documents(data: PreparedData) -> list[list[int]]:
    """Token ids of each training document, its end token last."""
    encoder = Encoder(data.tokenizer())
    config = data.manifest.config
    return [encoder([document.text])[0].tolist() for document in documents(config) if document.split == "train"]


def ids_of(sequences: Any) -> list[list[int]]:
    return [sequences[index]["input_ids"].tolist() for index in range(len(sequences))]


def test_packed_is_the_stream_cut_into_blocks(data: PreparedData, training_documents: list[list[int]]) -> None:
    assert len(data.manifest.splits["train"].shards) > 2
    stream = list(chain.from_iterable(training_documents))
    blocks = data.sequences("train", SequenceFormat(length=LENGTH))
    assert ids_of(blocks) == [stream[at : at + LENGTH] for at in range(0, len(stream) - LENGTH + 1, LENGTH)]
    assert all(torch.equal(item["input_ids"], item["labels"]) for item in map(blocks.__getitem__, range(len(blocks))))
    assert blocks.num_tokens(np.arange(3)) == 3 * LENGTH


def test_padded_is_a_document_each(data: PreparedData, training_documents: list[list[int]]) -> None:
    blocks = data.sequences("train", SequenceFormat(length=LENGTH, layout="padded"))
    end = end_token(data.tokenizer())
    assert {len(document) <= LENGTH for document in training_documents} == {True, False}
    assert len(blocks) == len(training_documents)
    for index, document in enumerate(training_documents):
        cut = document if len(document) <= LENGTH else [*document[: LENGTH - 1], end]
        filling = LENGTH - len(cut)
        assert blocks[index]["input_ids"].tolist() == cut + [data.manifest.pad_token] * filling
        assert blocks[index]["labels"].tolist() == cut + [IGNORED] * filling
        assert blocks.num_tokens(np.asarray([index])) == len(cut)


def test_padded_equals_the_tokenizers_own_cutting_and_padding(data: PreparedData) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(data.folder / "tokenizer")
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    config = data.manifest.config
    texts = [document.text for document in documents(config) if document.split == "train"]
    theirs = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length")
    blocks = data.sequences("train", SequenceFormat(length=LENGTH, layout="padded"))
    assert ids_of(blocks) == theirs.input_ids
    masks = [(blocks[index]["labels"] != IGNORED).long().tolist() for index in range(len(blocks))]
    assert masks == theirs.attention_mask


@pytest.mark.parametrize("length", [2, 7, 100])
def test_one_folder_serves_every_length(data: PreparedData, training_documents: list[list[int]], length: int) -> None:
    lengths = [min(len(document), length) for document in training_documents]
    padded = data.sequences("train", SequenceFormat(length=length, layout="padded"))
    assert padded.num_tokens(np.arange(len(lengths))) == sum(lengths)
    assert len(data.sequences("train", SequenceFormat(length=length))) == sum(map(len, training_documents)) // length


@pytest.mark.parametrize("index", [-1, 10_000])
def test_no_such_document(data: PreparedData, index: int) -> None:
    with pytest.raises(IndexError):
        data.sequences("train", SequenceFormat(length=LENGTH, layout="padded"))[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_sequences_hold_so_many_tokens(data: PreparedData, layout: Layout) -> None:
    blocks = data.sequences("validation", SequenceFormat(length=LENGTH, layout=layout))
    counts = [blocks.num_tokens(np.asarray([index])) for index in range(len(blocks))]
    for tokens in (1, counts[0], counts[0] + counts[1], sum(counts) // 2):
        some: Any = blocks.take(tokens)
        assert sum(counts[: len(some)]) >= tokens - (LENGTH - 1 if layout == "packed" else 0)
        assert sum(counts[: len(some) - 1]) < tokens
    assert len(blocks.take(10**9)) == len(blocks)  # pyright: ignore[reportArgumentType]
    assert blocks.take(None) is blocks


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_of_padded_documents_is_that_of_each_document_alone(data: PreparedData, batch_size: int) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **size)).double()
    blocks = data.sequences("validation", SequenceFormat(length=LENGTH, layout="padded"))
    total, tokens = 0.0, 0
    for index in range(len(blocks)):
        item = blocks[index]
        ids = item["input_ids"][item["labels"] != IGNORED][None]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    result = evaluate_loss(model, blocks, batch_size=batch_size)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)  # the losses are float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pass_meets_each_sequence_once(data: PreparedData, layout: Layout) -> None:
    blocks = data.sequences("train", SequenceFormat(length=LENGTH, layout=layout))
    order = ShuffledDataset(blocks, seed=3, num_sequences=2 * len(blocks) + 5)
    ids = ids_of(order)
    passes = [ids[: len(blocks)], ids[len(blocks) : 2 * len(blocks)]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(ids_of(blocks))
    assert passes[0] != passes[1]
    assert ids_of(ShuffledDataset(blocks, seed=3, num_sequences=9)) == ids[:9]
    assert ids_of(ShuffledDataset(blocks, seed=4, num_sequences=9)) != ids[:9]
    labels = (order[index]["labels"] for index in range(len(order)))
    assert order.num_tokens() == sum(int((label != IGNORED).sum()) for label in labels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_is_the_same_for_any_number_of_workers(data: PreparedData, layout: Layout, workers: int) -> None:
    blocks = data.sequences("train", SequenceFormat(length=LENGTH, layout=layout))
    order = ShuffledDataset(blocks, seed=0, num_sequences=150)
    loader = DataLoader(order, batch_size=4, num_workers=workers)
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == ids_of(order)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_step_has_the_same_sequences_for_any_number_of_processes(processes: int, accumulation: int) -> None:
    batch_size, steps = 16, 5
    micro_batch = batch_size // (processes * accumulation)
    batches = BatchSampler(SequentialSampler(range(steps * batch_size)), micro_batch, drop_last=False)
    by_process: list[list[Any]] = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    for step in range(steps):
        parts = [batch for mine in by_process for batch in mine[step * accumulation : (step + 1) * accumulation]]
        assert sorted(chain.from_iterable(parts)) == list(range(step * batch_size, (step + 1) * batch_size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_worker_processes_get_names_of_files_not_their_content(data: PreparedData, layout: Layout) -> None:
    blocks = data.sequences("train", SequenceFormat(length=LENGTH, layout=layout))
    pickled = pickle.dumps(blocks)
    # Which documents share a sequence is worked out once, and goes along.
    index = sum(value.nbytes for value in vars(blocks).values() if isinstance(value, np.ndarray))
    assert len(pickled) - index < 2000 < sum(shard.nbytes for shard in blocks.shards)
    again: SequenceDataset = pickle.loads(pickled)
    assert ids_of(again) == ids_of(blocks)
    assert all(isinstance(shard, np.memmap) for shard in again.shards)


def test_shards_end_with_documents(data: PreparedData, training_documents: list[list[int]]) -> None:
    lengths: list[int] = []
    for shard in data.manifest.splits["train"].shards:
        ends = np.fromfile(data.folder / shard.index, dtype="<u4")
        assert (ends[-1], len(ends)) == (shard.tokens, shard.documents)
        lengths += [int(end - start) for start, end in pairwise([0, *ends])]
    assert lengths == [len(document) for document in training_documents]
