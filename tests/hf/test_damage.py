"""Files that are truncated, altered, missing, or of a kind that could run code: one clear ValueError, nothing runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foldrank import fold_
from foldrank.data.tokenizer import train_tokenizer
from foldrank.hf.checkpoint import INDEX, fold_checkpoint, inspect, load

from .models import SHAPE, trained

READERS: dict[str, Callable[[Path], object]] = {
    "inspect": inspect,
    "load": load,
    "fold": lambda folder: fold_checkpoint(folder, folder.parent / "out"),
}
EACH = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    tokenizer = train_tokenizer(["no text"], 262)
    model = trained()
    model.save_pretrained(folder / "unfolded")
    model.save_pretrained(folder / "sharded", max_shard_size="3KB")
    fold_(model)
    model.save_pretrained(folder / "folded")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "llama")
    for checkpoint in folder.iterdir():
        tokenizer.save_pretrained(checkpoint)
    return folder


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def assert_refused(read: Callable[[Path], object], folder: Path, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as said:
        read(folder)
    assert str(folder) in str(said.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["unfolded", "sharded", "folded"])
def test_the_originals_are_whole(originals: Path, name: str) -> None:
    load(originals / name)
    inspect(originals / name)


@EACH
@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1], ids=str)
def test_truncated_weights(copy: Callable[[str], Path], read: Callable[[Path], object], kept: float) -> None:
    folder = copy("unfolded")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    assert_refused(read, folder, "truncated|damaged")


@EACH
def test_an_altered_header(copy: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    folder = copy("unfolded")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole.replace(b'"F32"', b'"F64"', 1))
    assert_refused(read, folder, "damaged")


@pytest.mark.parametrize("read", [READERS["load"], READERS["fold"]], ids=["load", "fold"])
def test_an_altered_residual(copy: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    folder = copy("unfolded")
    whole = (folder / "model.safetensors").read_bytes()
    assert b'"contiguous"' in whole
    (folder / "model.safetensors").write_bytes(whole.replace(b'"contiguous"', b'"contagious"', 1))
    with pytest.raises(ValueError, match=r"residual\.spec is of another residual|expansion"):
        read(folder)
    assert not (folder.parent / "out").exists()


@EACH
def test_no_weights(copy: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    folder = copy("unfolded")
    (folder / "model.safetensors").unlink()
    assert_refused(read, folder, r"not a whole checkpoint: model\.safetensors is missing")


@EACH
def test_a_missing_shard(copy: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(read, folder, f"not a whole checkpoint: {shard.name} is missing")


@EACH
@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../model.safetensors"}}'],
)
def test_a_damaged_index(copy: Callable[[str], Path], read: Callable[[Path], object], index: str) -> None:
    folder = copy("sharded")
    (folder / INDEX).write_text(index)
    assert_refused(read, folder, "damaged")


@EACH
@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no such model"}', '{"low_rank": {"rank": 0}}'])
def test_a_damaged_config(copy: Callable[[str], Path], read: Callable[[Path], object], text: str) -> None:
    folder = copy("unfolded")
    (folder / "config.json").write_text(text)
    assert_refused(read, folder, r"config\.json")


@EACH
def test_a_wrong_low_rank_field(copy: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    folder = copy("unfolded")
    config = json.loads((folder / "config.json").read_text())
    config["low_rank"]["ranks"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(read, folder, "unknown field ranks")


@EACH
def test_no_checkpoint(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=r"nowhere is no checkpoint: there is no such folder"):
        read(tmp_path / "nowhere")


def test_a_run_is_no_checkpoint_but_holds_some(originals: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean .*/folded or .*/llama or "):
        inspect(originals)


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"model": {"type": "no such model"}}'])
def test_a_damaged_tokenizer(copy: Callable[[str], Path], text: str | None) -> None:
    folder = copy("folded")
    if text is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(text)
    assert_refused(load, folder, "tokenizer")


def test_a_dense_model_with_missing_tensors_is_not_filled_at_random(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert_refused(load, folder, "not a whole checkpoint of a LlamaForCausalLM: 9 tensors are missing")
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 23}))
    assert_refused(load, folder, "6 tensors are of another shape")


class Trap:
    """Unpickling one of these makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.file,)


@EACH
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_never_read(
    copy: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, read: Callable[[Path], object], name: str
) -> None:
    sprung = tmp_path_factory.mktemp("trap") / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap of this test does not work"
    sprung.unlink()
    folder = copy("unfolded")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(sprung)}, folder / name)
    assert_refused(read, folder, r"model\.safetensors")
    assert not sprung.exists()


@EACH
@pytest.mark.parametrize("name", ["unfolded", "llama"])
def test_code_in_a_checkpoint_does_not_run(
    copy: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, read: Callable[[Path], object], name: str
) -> None:
    sprung = tmp_path_factory.mktemp("trap") / "sprung"
    folder = copy(name)
    (folder / "trap.py").write_text(f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model", "AutoModelForCausalLM": "trap.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    if (name, read) == ("llama", READERS["fold"]):
        assert_refused(read, folder, "llama is dense")
    else:
        read(folder)
    # An architecture that is not known here would need its code: refused.
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes, "model_type": "trap"}))
    assert_refused(read, folder, "config.json")
    assert not sprung.exists()
