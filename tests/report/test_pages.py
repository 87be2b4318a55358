"""Both kinds of page in a real browser: drawn, silent, offline, no wider than the window, open to everybody."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from foldrank.compare.analysis import analyse
from foldrank.compare.progress import Unfinished
from foldrank.compare.report import report_html
from foldrank.runs.page import write_page

from ..browser import IN_A_BROWSER, SIZES, Page, opened
from ..compare.studies import by_id, final_runs, planted, study_of, sweep_runs
from ..runs.logs import entries, write_run
from ..small_runs import Run

pytestmark = IN_A_BROWSER

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;<a href='javascript:alert(1)'>"
"""What a model, a title, a log or a recipe may hold."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = study_of("dense", "cola", "cola-dlr", title=HOSTILE)
    records = [*sweep_runs(study), *final_runs(study, planted({"cola": 0.1, "cola-dlr": 0.05}))]
    records = [replace(record, metrics=replace(record.measured, sample=HOSTILE)) for record in records]
    file = tmp_path_factory.mktemp("page") / "report.html"
    running = Unfinished(id=records[-1].id, step=3, loss=4.5)
    file.write_text(report_html(analyse(study, by_id(records[:-1]), [running])))
    return file


@pytest.fixture(scope="module")
def run(finished_run: Run) -> Path:
    return finished_run.out / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs over each other, all of whose texts are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = []
    for name in ("one", "two"):
        log = [
            {
                key: f"{HOSTILE} after {entry['step']}" if key in ("text", "host") else value
                for key, value in entry.items()
            }
            for entry in entries(40, every=10)
        ]
        log += [{**entry, "note": HOSTILE} for entry in log if "loss" in entry][-1:]
        log.append({"step": 40, "event": "stopped", "message": HOSTILE})
        runs.append(write_run(folder / name, iter(log), recipe=HOSTILE, steps=60))
    write_page(runs, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("kind", ["study", "run", "hostile"])
def test_a_page_is_drawn_and_fits_and_keeps_nobody_out(
    browser: Page, kind: str, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    file: Path = request.getfixturevalue(kind)
    browser.open(file, width, scheme)
    assert browser.driver.get_log("browser") == []
    assert browser.requests() == [file.as_uri()]
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") == width
    # Each chart shows one picture, with marks, inside its box.
    charts = browser.run(
        "return [...document.querySelectorAll('figure.chart')].map(chart => {"
        " const shown = [...chart.querySelectorAll('.plot')].filter(plot => !plot.hidden);"
        " const box = chart.getBoundingClientRect(), picture = shown[0].querySelector('svg').getBoundingClientRect();"
        " return {shown: shown.length, marks: shown[0].querySelectorAll('path, use').length, height: picture.height,"
        "  inside: picture.left >= box.left && picture.right <= box.right + 1}})"
    )
    assert len(charts) == {"study": 9, "run": 7, "hostile": 6}[kind]
    assert all(c["shown"] == 1 and c["marks"] > 5 and c["inside"] and c["height"] > 50 for c in charts), charts
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128
    assert dark == (scheme == "dark")
    assert browser.serious() == []


@pytest.mark.parametrize("kind", ["study", "hostile"])
def test_nothing_in_a_hostile_page_runs(browser: Page, kind: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(kind), 390, "light")
    assert browser.driver.get_log("browser") == []
    assert browser.run("return document.querySelectorAll('img, iframe, object').length") == 0
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return [...document.querySelectorAll('a')].every(a => a.getAttribute('href')[0] === '#')")
    assert browser.run("return document.querySelector('pre').textContent").startswith(HOSTILE)
    attributes = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => a.name))"
    assert not [name for name in browser.run(f"return {attributes}") if name.startswith("on")]


COLOUR = "return getComputedStyle(document.querySelector('#curve [data-series] path')).stroke"


def curve(browser: Page) -> None:
    """Marks the first curve of the page for `COLOUR`."""
    browser.run("document.querySelector('.plot').id = 'curve'")


def test_charts_follow_the_scheme_while_the_page_is_open(browser: Page, run: Path) -> None:
    browser.open(run, 1440, "light")
    curve(browser)
    light = browser.run(COLOUR)
    browser.scheme("dark")
    assert browser.run(COLOUR) != light
    browser.scheme("light")
    assert browser.run(COLOUR) == light


def test_a_chart_shows_another_view_and_hides_a_series_by_keyboard(browser: Page, study: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(study, 1440, "light")
    figure = browser.driver.find_element(By.XPATH, "//figure[p[@id='t1-curves-title']]")
    shown = "return [...arguments[0].querySelectorAll('.plot:not([hidden]) text')].map(e => e.textContent)"
    assert "Training tokens" in browser.driver.execute_script(shown, figure)
    figure.find_element(By.CSS_SELECTOR, "select").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    texts = browser.driver.execute_script(shown, figure)
    assert "Training FLOPs" in texts
    assert "Training tokens" not in texts

    lines = (
        "return [...arguments[0].querySelectorAll('.plot:not([hidden]) [data-series]')]"
        ".filter(e => e.style.display !== 'none').length"
    )
    before = browser.driver.execute_script(lines, figure)
    figure.find_element(By.CSS_SELECTOR, "input[type=checkbox]").send_keys(Keys.SPACE)
    assert browser.driver.execute_script(lines, figure) < before


@pytest.mark.parametrize("kind", ["study", "run"])
def test_the_keyboard_reaches_everything_and_focus_is_seen(
    browser: Page, kind: str, request: pytest.FixtureRequest
) -> None:
    browser.open(request.getfixturevalue(kind), 1440, "light")
    browser.run("scrollTo(0, 0); document.querySelector('.skip').focus()")
    assert browser.run("return document.activeElement.getBoundingClientRect().left") > 0
    wanted = {"A.", "DIV.scroll", "SELECT.", "INPUT.", "PRE."} | ({"SUMMARY."} if kind == "study" else set())
    assert wanted <= browser.reached_by_keyboard()


def test_a_pointer_is_told_what_a_point_is(browser: Page, run: Path) -> None:
    browser.open(run, 1440, "light")
    titles = browser.run("return [...document.querySelectorAll('.plot use > title')].map(e => e.textContent)")
    assert any("validation, step 12: " in title for title in titles), titles[:3]


def test_paper_is_white_also_from_a_dark_screen(browser: Page, run: Path) -> None:
    browser.open(run, 1440, "dark")
    curve(browser)
    dark = browser.run(COLOUR)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(COLOUR) != dark
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(COLOUR) == dark


def test_it_prints(browser: Page, run: Path) -> None:
    import base64

    browser.open(run, 1440, "light")
    paper = browser.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")
