"""A method's name is parsed once; recipes whose bases go in a circle are refused."""

from pathlib import Path

import pytest

from foldrank.recipes import RECIPES, load_recipe
from foldrank.recipes.methods import METHODS, Method


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("variants", [(), ("folded",), ("folded", "latents")])
def test_a_name_and_what_it_means_are_one(method: Method, variants: tuple[str, ...]) -> None:
    name = "-".join((str(method), *variants))
    parsed = Method.parse(name, ("latents", "folded"))
    assert (parsed.plain, parsed.variants, str(parsed)) == (method, variants, name)
    assert parsed.without_residual().residual is False


@pytest.mark.parametrize("name", ["cola_dlr", "cola-dlr-folded", "dense-dlr", "", "-dlr", "dlr"])
def test_other_names_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=f"no method is called '{name}'; the nearest are "):
        Method.parse(name)


def test_a_method_makes_its_recipe() -> None:
    assert Method.parse("cola-dlr").recipe(RECIPES["tiny-dense"], 32) == RECIPES["tiny-cola-dlr"]


def test_bases_in_a_circle_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("itself.yaml").write_text("base: itself.yaml\n")
    with pytest.raises(ValueError, match=r"base goes in a circle: itself\.yaml -> itself\.yaml"):
        load_recipe("itself.yaml")
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        Path(f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ValueError, match=r"circle: b\.yaml -> c\.yaml -> b\.yaml"):
        load_recipe("a.yaml")


@pytest.mark.parametrize("base", ["3", "[demo]", "{a: 1}", "1.5", "true"])
def test_a_base_that_is_no_name_is_one_line(tmp_path: Path, base: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: {base}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: base must be the name of a recipe or of a \.yaml file, got"):
        load_recipe(str(file))


def test_names_of_foldrank_0_1_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "base: tiny-sltrain-dlr\nlow_rank: {options: {density: 0.2}}\ntrain: {control: folded}\n", encoding="utf-8"
    )
    recipe = load_recipe(str(file))
    assert recipe.low_rank is not None
    assert (recipe.low_rank.extra_config, recipe.train.ablation) == ({"density": 0.2}, "folded")
