"""A safetensors file written anew, tensor by tensor: to the last byte what the library writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldrank import LowRankConfig, ResidualConfig, attach_residual_, fold_state_dict
from foldrank.hf.checkpoint import fold_checkpoint, weight_files
from foldrank.hf.rewrite import rewrite

from .models import trained

LARGEST_FILE = 3000
LOW_RANK: dict[str, dict[str, Any]] = {
    "fixed alpha": {"residual": ResidualConfig(alpha=0.7)},
    "random and trainable": {"residual": ResidualConfig(alpha=0.7, trainable=True, expansion="random")},
    "scale": {"scale": 0.4, "residual": ResidualConfig()},
    "trainable scale alone": {"scale": "trainable"},
}
TENSORS: dict[str, Tensor] = {
    "whole": torch.arange(6).view(2, 3),
    "odd": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True]),
    "half": torch.randn(3, 1, dtype=torch.float16),
    "brain": torch.randn(1, 7, dtype=torch.bfloat16),
    "wide": torch.randn(2, 2, dtype=torch.float64),
    "number": torch.tensor(1.5),
    "no rows": torch.zeros(0, 3),
    'a "name" of é': torch.randn(70_000),  # more than is copied at a time
}
FLOATING = ("half", "brain", "wide", "number", "no rows")


def save_unsorted(tensors: dict[str, Tensor], file: Path) -> None:
    """As other writers may do it: in the order given, so that nothing is aligned, other metadata."""
    header: dict[str, Any] = {"__metadata__": {"by": "hand"}}
    names = {torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL", torch.float16: "F16", torch.bfloat16: "BF16"}
    names |= {torch.float64: "F64", torch.float32: "F32"}
    content = b""
    for name, tensor in tensors.items():
        begin = len(content)
        content += bytes(tensor.flatten().view(torch.uint8).tolist())
        header[name] = {"data_offsets": [begin, len(content)], "dtype": names[tensor.dtype], "shape": [*tensor.shape]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("writer", ["the library", "another"])
def test_tensors_changed_copied_renamed_and_left_out(writer: str, tmp_path: Path) -> None:
    source, target, expected = (tmp_path / name for name in ("source", "target", "expected"))
    save = save_file if writer == "the library" else save_unsorted
    save({**TENSORS, "left out": torch.ones(3)}, source)
    names = {**{name: name for name in TENSORS}, "odd": "other"}
    total = rewrite(source, target, names=names, changes=dict.fromkeys(FLOATING, lambda tensor: 2 * tensor))
    tensors = {names[name]: tensor * 2 if name in FLOATING else tensor for name, tensor in TENSORS.items()}
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    written = load_file(target)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(written[name], tensor)
    size = int.from_bytes(target.read_bytes()[:8], "little")
    header = json.loads(target.read_bytes()[8 : 8 + size])
    carried = {} if writer == "the library" else {"by": "hand"}
    assert header.pop("__metadata__") == {"format": "pt", **carried}
    for name, entry in header.items():
        assert (8 + size + entry["data_offsets"][0]) % tensors[name].itemsize == 0
    if writer == "the library":
        save_file(tensors, expected, metadata={"format": "pt"})
        assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("max_shard_size", [10**9, LARGEST_FILE], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_rank", LOW_RANK.values(), ids=LOW_RANK)
def test_a_folded_checkpoint_is_what_the_library_writes_of_the_folded_state(
    low_rank: dict[str, Any], dtype: torch.dtype, max_shard_size: int, tmp_path: Path
) -> None:
    model = trained(LowRankConfig(rank=3, activation="silu", **low_rank), dtype=dtype)
    model.save_pretrained(tmp_path / "unfolded", max_shard_size=max_shard_size)
    fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    folded = fold_state_dict(model.state_dict())
    for file in weight_files(tmp_path / "folded"):
        held = load_file(tmp_path / "unfolded" / file.name).keys() & folded.keys()
        save_file({name: folded[name] for name in held}, tmp_path / "expected", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "expected").read_bytes()


def test_attached_weights_of_a_low_rank_model_go_back_to_their_names(tmp_path: Path) -> None:
    model = trained()
    attach_residual_(model, ["lm_head.weight"], ResidualConfig())
    model.save_pretrained(tmp_path / "unfolded")
    assert fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded") == 15
    written, expected = load_file(tmp_path / "folded" / "model.safetensors"), fold_state_dict(model.state_dict())
    assert written.keys() == expected.keys()
    assert "lm_head.weight" in written
    assert all(torch.equal(written[name], expected[name]) for name in written)


def test_what_cannot_be_changed_or_ends_too_early_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_file(TENSORS, source)
    with pytest.raises(ValueError, match="odd is of U8, and only F64, F32, F16, BF16 can be folded"):
        rewrite(source, tmp_path / "target", names={"odd": "odd"}, changes={"odd": lambda tensor: tensor})
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ValueError, match="source is truncated"):
        rewrite(source, tmp_path / "target", names={name: name for name in TENSORS}, changes={})
