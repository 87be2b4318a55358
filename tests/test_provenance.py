"""Where something comes from, and files that are whole or absent."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import foldrank
from foldrank import provenance
from foldrank.atomic import new_folder, write_text

TREE = Path(foldrank.__file__).parents[2]


def test_the_commit_is_that_of_this_tree() -> None:
    head = subprocess.run(["git", "-C", TREE, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert provenance.commit() == (head.stdout.strip() or None)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def test_the_commit_of_another_project_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = tmp_path / ".venv" / "foldrank"
    environment.mkdir(parents=True)
    copy = shutil.copy(provenance.__file__, environment / "provenance.py")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "mine.py").write_text("")
    for command in (["init", "-q"], ["add", "mine.py"], ["commit", "-q", "-m", "mine"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert provenance.commit() is None
    subprocess.run([*git, "add", "-f", str(copy)], check=True)
    assert provenance.commit() is not None


def test_a_package_without_metadata_is_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", missing)
    assert provenance.versions()["foldrank"] == "source"


def test_it_runs_from_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    shutil.copytree(TREE / "src" / "foldrank", tmp_path / "foldrank")
    program = "import foldrank.provenance as p; print(p.__file__); print(p.commit())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == [str(tmp_path / "foldrank" / "provenance.py"), "None"]


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "two \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "one"


def test_a_folder_is_whole_or_absent_and_takes_nobody_s_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (tmp_path / "folder.partial").mkdir()
    with pytest.raises(FileNotFoundError), new_folder(folder) as work:
        (work / "no folder" / "file").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.partial"]
    with new_folder(folder) as work:
        (work / "file").write_text("one")
    assert (folder / "file").read_text() == "one"
    with pytest.raises(FileExistsError, match="appeared meanwhile"), new_folder(folder) as work:
        (work / "file").write_text("two")
    assert (folder / "file").read_text() == "one"
    with new_folder(folder, replace=True) as work:
        (work / "file").write_text("two")
    assert (folder / "file").read_text() == "two"
    assert sorted(os.listdir(tmp_path)) == ["folder", "folder.partial"]
