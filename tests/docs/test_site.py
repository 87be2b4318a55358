"""The site: built without a warning, whole, with links that lead somewhere, and open to everybody in a browser."""

import inspect
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from foldrank.cli import COMMANDS
from foldrank.finetune.settings import setting_help
from foldrank.recipes import RECIPES
from foldrank.recipes.schema import field_help

from ..browser import IN_A_BROWSER, SIZES, Page, opened

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "foldrank",
    "foldrank.core",
    "foldrank.surgery",
    "foldrank.optim",
    "foldrank.hf",
    "foldrank.recipes",
    "foldrank.runtime",
)
SECONDS = 90
"""That a build may take on two idle cores."""

pytestmark = pytest.mark.apart


class Links(HTMLParser):
    """The links of a page, and the places that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        values = dict(attrs)
        self.links += [link for name in ("href", "src") if (link := values.get(name))]
        if place := values.get("id"):
            self.places.add(place)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew from a copy, so that nothing that lies in the tree helps or harms."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("_build", "reference"))
    for name in ("src", "tests", "studies", "benchmarks", "CHANGELOG.md", "EXPERIMENTS.md", "CONTRIBUTING.md"):
        (folder / name).symlink_to(ROOT / name)
    began = time.perf_counter()
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", source, folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert time.perf_counter() - began < SECONDS
    return folder / "html"


def text_of(site: Path, *pages: str) -> str:
    return "".join((site / "reference" / f"{page}.html").read_text() for page in pages)


def test_every_public_name_command_setting_and_recipe_is_there(site: Path) -> None:
    api = text_of(site, "api")
    for package in PACKAGES:
        for name in import_module(package).__all__:
            assert re.search(rf"\b{name}\b", api), f"{package}.{name}"
    commands, settings, recipes = (text_of(site, page) for page in ("commands", "settings", "recipes"))
    assert [command.name for command in COMMANDS if f'id="foldrank-{command.name}' not in commands] == []
    assert [name for name in (*field_help(), *setting_help()) if f">{name}<" not in settings] == []
    assert [name for name in RECIPES if f">{name}<" not in recipes] == []


def test_each_public_name_has_its_example() -> None:
    without = []
    for package in PACKAGES:
        module = import_module(package)
        values = {name: getattr(module, name) for name in module.__all__}
        without += [
            f"{package}.{name}"
            for name, value in values.items()
            if callable(value) and ">>>" not in (inspect.getdoc(value) or "")
        ]
    assert without == []


def test_refusals_are_found_by_their_words(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", text_of(site, "troubleshooting"))
    for words in (
        "holds no run to go on with",
        "is neither a run nor a study",
        "that matches no linear layer",
        "no recipe is called",
        "is no checkpoint",
        "of the training order",
    ):
        assert words in page, words


def test_no_link_of_the_site_leads_nowhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert len(pages) > 35
    broken = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places
            ):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_asked_of_the_network(site: Path) -> None:
    for page, found in {page: Links(page) for page in site.rglob("*.html")}.items():
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text())
        assert loaded == [], page
        assert found.links


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("chromium")) as page:
        yield page


PAGES = [
    *("index", "start", "data", "reference/recipes", "reference/files", "notebooks/ten-minutes"),
    *("reference/settings", "reference/api", "reference/commands", "reference/troubleshooting"),
]


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("page", PAGES)
@IN_A_BROWSER[1]
def test_the_site_fits_and_keeps_nobody_out(browser: Page, site: Path, page: str, width: int, scheme: str) -> None:
    browser.open(site / f"{page}.html", width, scheme)
    assert browser.driver.get_log("browser") == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
    assert dark == (scheme == "dark")
    assert browser.serious() == []


@IN_A_BROWSER[1]
def test_the_search_finds_from_a_file(browser: Page, site: Path) -> None:
    browser.open(site / "search.html", 1440, "light")
    browser.driver.get((site / "search.html").as_uri() + "?q=skip_nonfinite")
    browser.wait("return document.querySelectorAll('#search-results li').length > 0")


@IN_A_BROWSER[1]
def test_the_keyboard_reaches_the_site(browser: Page, site: Path) -> None:
    browser.open(site / "start.html", 1440, "light")
    reached = {tag.partition(".")[0] for tag in browser.reached_by_keyboard(120)}
    assert {"A", "BUTTON", "INPUT"} <= reached
