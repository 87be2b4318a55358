import subprocess
import sys
from types import ModuleType

import pytest

import foldrank
import foldrank.surgery

PUBLIC = [
    "AnchoredDecay",
    "AttachReport",
    "DuplicatedLatentResidual",
    "FactorizeReport",
    "FoldAtStartReport",
    "FoldReport",
    "LowRankConfig",
    "LowRankLinear",
    "ResidualConfig",
    "SparseLowRankLinear",
    "attach_residual_",
    "factorize_",
    "fold_",
    "fold_at_start_",
    "fold_state_dict",
    "fold_weight",
]

# Only torch, what torch itself requires, and foldrank may come from outside the standard library; numpy may not.
IMPORT_ALONE = """
import sys
from importlib.machinery import PathFinder

ALLOWED = {
    "filelock", "foldrank", "fsspec", "functorch", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "torch",
    "torchgen", "typing_extensions",
}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ALLOWED:
            raise ModuleNotFoundError(f"refused {name}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names | {"__main__"}]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
import warnings
warnings.simplefilter("ignore")  # torch tells that there is no numpy
"""

USE = """
import torch
from foldrank import *
from foldrank.surgery.factorize import describe
try:
    import transformers
except ModuleNotFoundError as error:
    assert "refused" in str(error)
else:
    raise AssertionError("the import hook does not work")
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
both = ["0", "1"]
print(factorize_(model, LowRankConfig(rank=2, targets=both, residual=ResidualConfig(expansion="random"))))
model(torch.zeros(3, 8)).sum().backward()
describe(model).to_dict()
fold_state_dict(model.state_dict())
print(fold_(model))
theirs = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8))
print(attach_residual_(theirs, "1.weight", ResidualConfig()))
theirs(torch.zeros(3, 8)).sum().backward()
fold_state_dict(theirs.state_dict())
print(fold_(theirs))
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_pinned() -> None:
    assert foldrank.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(foldrank) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_and_known_by_their_home(name: str) -> None:
    value = getattr(foldrank, name)
    assert value.__name__ == name
    assert value.__module__.startswith("foldrank.")
    assert value.__doc__
    assert getattr(sys.modules[value.__module__], name) is value


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in (foldrank.core, foldrank.surgery) for name in package.__all__]
)
def test_names_of_core_and_surgery_are_those_of_their_modules(package: ModuleType, name: str) -> None:
    assert set(package.__all__) <= set(dir(package))
    value = getattr(package, name)
    assert name == "BACKBONES" or (value.__name__, value.__module__.rpartition(".")[0]) == (name, package.__name__)
    if name in PUBLIC:
        assert getattr(foldrank, name) is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'foldrank' has no attribute 'unfold_'"):
        foldrank.unfold_  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'foldrank\.core' has no attribute 'unfold_'"):
        foldrank.core.unfold_  # noqa: B018


def test_core_imports_torch_alone() -> None:
    output = run(IMPORT_ALONE + USE)
    assert "converted 2 of 2 linear layers" in output
    assert "folded 2 low-rank layers" in output
    assert "gave 1 of 1 weights a residual" in output


def test_configs_do_not_wait_for_torch() -> None:
    program = "import sys, foldrank; foldrank.LowRankConfig(rank=2); print('torch' in sys.modules)"
    assert run(program) == "False\n"
