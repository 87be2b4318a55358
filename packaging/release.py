"""`make release`: builds sdist and wheel, checks what they say, and tries the wheel where no source is.

In order: the changelog against the version; `build` and `twine check`; what the wheel holds; the wheel in an empty
environment outside the tree, where the main job runs for a few steps; each extra alone; the lowest stated versions
under the tests of core and surgery. With --quick the last two are left out. Every failure ends it.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
EXTRAS = {
    "data": "import datasets, pyarrow",
    "report": "import foldrank.compare.report, scipy",
    "finetune": "import foldrank.finetune.finetune, foldrank.finetune.trainers, peft, sklearn, trl",
    "onnx": "import foldrank.export.onnx, onnx, onnxruntime, onnxscript",
    "openvino": "import foldrank.export.openvino, openvino",
    "tasks": "import foldrank.tasks.harness, lm_eval",
    "trackers": "import tensorboard, trackio, wandb",
    "examples": "import lightning, fastapi, uvicorn, openai",
    "docs": "import sphinx, myst_nb, furo, sphinxarg, latex2mathml, jupytext, nbclient, ipykernel",
}
"""What each extra promises. `dev` is all of them."""
NEEDED = ("foldrank/py.typed", "foldrank/report/page/report.html", "foldrank/recipes/tiny.yaml")


def main() -> None:
    """All steps."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = check_changelog()
    wheel = build(version)
    promised = set(settings["project"]["optional-dependencies"]) - {"dev"}
    assert promised == set(EXTRAS), f"extras without a check: {promised ^ set(EXTRAS)}"
    with tempfile.TemporaryDirectory(prefix="foldrank-release-") as folder:
        plain = environment(Path(folder) / "plain", "constraints.txt", str(wheel))
        try_main_job(plain, version)
        if "--quick" not in sys.argv:
            try_extras(plain, wheel)
            try_lowest(Path(folder) / "lowest", wheel)
    say(f"foldrank {version}: {wheel.relative_to(ROOT)} is ready")


def say(text: str) -> None:
    """What is done now."""
    print(f"--- {text}", flush=True)


def run(*command: object, where: Path = ROOT) -> str:
    """A command's output; its failure ends the release, with what it said."""
    done = subprocess.run(list(map(str, command)), cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def check_changelog() -> str:
    """The version, whose changes the changelog has: of a release under its number, of a .dev under Unreleased."""
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/foldrank/__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    number, text = version[1], (ROOT / "CHANGELOG.md").read_text()
    sections = dict(re.findall(r"^## \[(.+?)\](.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    wanted = "Unreleased" if ".dev" in number else number
    if not re.search(r"^- ", sections.get(wanted, ""), re.MULTILINE):
        sys.exit(f"version {number}: CHANGELOG.md has nothing under [{wanted}]")
    if wanted == number and re.search(r"^- ", sections.get("Unreleased", ""), re.MULTILINE):
        sys.exit(f"version {number}: CHANGELOG.md still has changes under [Unreleased]")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if cited and cited[1].strip('"') != number:
        sys.exit(f"version {number}: CITATION.cff says {cited[1]}")
    say(f"version {number}: its changes are in CHANGELOG.md")
    return number


def build(version: str) -> Path:
    """The wheel, beside the sdist."""
    for old in DIST.glob("foldrank-*"):
        old.unlink()
    say("building sdist and wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    files = sorted(DIST.glob("foldrank-*"))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    wheel = next(DIST.glob(f"foldrank-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    if missing := [name for name in NEEDED if name not in names]:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    if strays := [name for name in names if not name.startswith(("foldrank/", f"foldrank-{version}.dist-info/"))]:
        sys.exit(f"{wheel.name} holds what is no part of the package: {', '.join(strays[:3])}")
    say(f"{', '.join(f'{file.name} ({file.stat().st_size / 1024:.0f} KiB)' for file in files)}")
    return wheel


def environment(folder: Path, constraints: str, *packages: str) -> Path:
    """An empty environment's Python, with PyTorch by its pinned version and then these packages."""
    say(f"an empty environment with {', '.join(Path(name).name for name in packages)} ({constraints})")
    run(sys.executable, "-m", "venv", folder)
    python, pinned = folder / "bin" / "python", ROOT / constraints
    torch = re.search(r"^torch==.+$", pinned.read_text(), re.MULTILINE)
    assert torch is not None
    run(python, "-m", "pip", "install", "-q", torch[0])
    run(python, "-m", "pip", "install", "-q", "-c", pinned, *packages)
    return python


def try_main_job(python: Path, version: str) -> None:
    """The main job for a few steps, its page, and what doctor says, in a folder that is not the tree's."""
    command = python.parent / "foldrank"
    with tempfile.TemporaryDirectory(prefix="foldrank-job-") as folder:
        where = Path(folder)
        say("the main job from the wheel, 4 steps")
        job = ("pretrain", "demo", "--steps", 4, "--train.eval_every", 4, "--train.batch_size", 2, "--json")
        metrics = json.loads(run(command, *job, where=where))
        assert metrics["steps"] == 4
        assert metrics["versions"]["foldrank"] == version
        for name in ("report.html", "folded/model.safetensors", "metrics.json"):
            assert (where / "runs" / "demo" / name).is_file(), name
        load = "from transformers import AutoModelForCausalLM as A; import sys; " \
            "A.from_pretrained(sys.argv[1], trust_remote_code=True); assert 'foldrank' not in sys.modules"  # fmt: skip
        run(python, "-c", load, where / "runs/demo/folded", where=where)
        said = json.loads(run(command, "doctor", "--json", where=where))
        place = run(python, "-c", "import foldrank; print(foldrank.__file__)", where=where).strip()
        assert str(python.parents[1]) in place, place
        say(f"validation loss {metrics['val_loss_folded']:.4f}, folded; doctor told {len(said)} things")


def try_extras(plain: Path, wheel: Path) -> None:
    """Each extra in an environment that sees the plain one's packages and has nothing else."""
    site = run(plain, "-c", "import site; print(site.getsitepackages()[0])").strip()
    for extra, probe in EXTRAS.items():
        with tempfile.TemporaryDirectory(prefix=f"foldrank-{extra}-") as folder:
            run(sys.executable, "-m", "venv", folder)
            python = Path(folder) / "bin" / "python"
            own = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
            (Path(own) / "plain.pth").write_text(site + "\n")
            constraints = ROOT / "constraints.txt"
            run(python, "-m", "pip", "install", "-q", "-c", constraints, f"foldrank[{extra}] @ {wheel.as_uri()}")
            run(python, "-W", "ignore", "-c", probe, where=Path(folder))
            say(f"extra {extra}: {probe}")


def try_lowest(folder: Path, wheel: Path) -> None:
    """The tests of core and surgery by the lowest versions that the metadata allows."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = {name: version for line in lines if not line.startswith("#") for name, version in [line.split("==")]}
    stated = dict(each.partition(",")[0].split(">=") for each in settings["project"]["dependencies"])
    for name, least in stated.items():
        if not (pinned.get(name, "") + ".0.0").startswith(least + "."):
            sys.exit(f"pyproject.toml allows {name} {least}, and constraints-lowest.txt tries {pinned.get(name)}")
    python = environment(folder, "constraints-lowest.txt", str(wheel), "pytest", "pytest-xdist")
    options = ("-q", "-n", "auto", "-m", "not apart", "-p", "no:cacheprovider")
    said = run(python, "-m", "pytest", *options, "tests/core", "tests/surgery")
    say(f"the tests of core and surgery by the lowest versions: {said.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
