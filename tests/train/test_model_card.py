"""The card beside a folded checkpoint says what the run measured; the files are readable as any."""

import stat
from pathlib import Path

import pytest
import yaml

from foldrank.hf.checksums import verify_checksums
from foldrank.structured import read_json_table, to_json
from tests.called import Foldrank, tree
from tests.small_runs import Run


def test_the_card_says_what_the_run_measured(finished_run: Run) -> None:
    text = (finished_run.out / "folded" / "README.md").read_text()
    fields = yaml.safe_load(text.split("---")[1])
    assert fields["library_name"] == "transformers"
    assert {"foldrank", "low-rank"} == set(fields["tags"])
    metrics = finished_run.metrics
    assert f"{metrics['val_loss_folded']:.6f}" in text
    assert f"{metrics['val_perplexity_folded']:.4f}" in text
    assert metrics["text_sha256"] in text
    assert f"| parameters | {metrics['params']:,} (dense: {metrics['params_dense']:,}) |" in text
    assert "trust_remote_code=True" in text
    assert verify_checksums(finished_run.out / "folded") is None


def test_no_file_of_a_checkpoint_is_for_its_owner_alone(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    usual = stat.S_IMODE((tmp_path / "file").stat().st_mode)
    for folder in ("folded", "unfolded"):
        for file in (finished_run.out / folder).iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == usual, file


@pytest.mark.parametrize("command", ["info", "fold"])
def test_a_quantized_checkpoint_is_refused_by_name(
    finished_run: Run, tmp_path: Path, foldrank: Foldrank, command: str
) -> None:
    folder = tmp_path / "quantized"
    for name, content in tree(finished_run.out / "folded").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content or b"")
    config = read_json_table(folder / "config.json") | {"quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(to_json(config))
    done = foldrank(command, folder, *(("--out", tmp_path / "out") if command == "fold" else ()))
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "is quantized (torchao)" in done.stderr
