"""Checkpoints on the hub: what is uploaded by the ordinary calls, and what is read by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, RepoUrl, constants

from foldrank import fold_
from foldrank.commands.checkpoint_arguments import checkpoint_folder
from foldrank.hub import download, is_reachable
from tests.called import Foldrank
from tests.hf.models import trained
from tests.small_runs import Run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of each commit, where the hub is out of reach."""
    names: list[str] = []

    def create_repo(_: HfApi, repo_id: str, **__: Any) -> RepoUrl:
        return RepoUrl(f"{constants.ENDPOINT}/{repo_id}")

    def create_commit(_: HfApi, *, operations: list[CommitOperationAdd], **__: Any) -> CommitInfo:
        names.extend(operation.path_in_repo for operation in operations)
        url = f"{constants.ENDPOINT}/someone/model/commit/{COMMIT}"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=COMMIT)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return names


@pytest.mark.parametrize("form", ["folded", "unfolded"])
@pytest.mark.parametrize("call", ["push_to_hub", "save_pretrained"])
def test_a_push_takes_the_modelling_file_along(uploaded: list[str], call: str, form: str, tmp_path: Path) -> None:
    model: Any = trained()
    if form == "folded":
        fold_(model)
    if call == "push_to_hub":
        model.push_to_hub("someone/model")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model")
    assert {"config.json", "model.safetensors", "modeling_lowrank_llama.py"} <= set(uploaded)


@pytest.fixture
def cached(finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folded checkpoint in the hub's cache on this machine, as its library lays it out."""
    folder = tmp_path / "models--someone--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(finished_run.out / "folded", folder / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return "hf://someone/model"


def test_commands_take_a_repository_by_name(cached: str, foldrank: Foldrank) -> None:
    done = foldrank("info", cached, "--json")
    assert done.code == 0, done.stderr
    assert done.json["state"] == "folded"
    assert foldrank("generate", cached, "--prompt", "min", "--max-new-tokens", "2").code == 0


def test_a_folder_is_no_repository() -> None:
    assert checkpoint_folder("runs/demo") == Path("runs/demo")


@pytest.mark.parametrize("command", ["info", "generate", "evaluate", "fold", "finetune", "export", "factorize"])
def test_without_network_it_is_one_line(command: str, foldrank: Foldrank) -> None:
    done = foldrank(command, "hf://someone/model")
    assert done.code == 2
    assert (
        "hf://someone/model: the hub cannot be reached, and its cache on this machine does not hold it" in done.stderr
    )


def test_a_name_that_cannot_be_one_is_one_line() -> None:
    assert not is_reachable()  # the tests have no network
    for name in ("hf://", "hf://a/b/c", "hf://../..", "hf://a/b@c@d"):
        with pytest.raises(ValueError, match=r"^hf://") as caught:
            download(name)
        assert "\n" not in str(caught.value)
