"""The page in a real browser: drawn, silent, offline, and no wider than its window."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldrank.compare.analysis import analyse
from foldrank.compare.progress import Unfinished
from foldrank.compare.report import report_html

from .studies import by_id, final_runs, planted, study_of, sweep_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.apart,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
    ),
]

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
"""What a model or a title may hold."""

LINE = "return [...document.querySelectorAll('#t1-curves .js-line')].at(-1).style.stroke"
"""The colour of a line of a chart; the first is that of a band, which has none."""

SIZES = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]


class Page:
    """A page that is open in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, width: int, scheme: str) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.scheme(scheme)
        self.driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        self.driver.get(file.as_uri())
        for plot in self.run("return [...document.querySelectorAll('.plot')].map(plot => plot.id)"):
            self.run(f"document.getElementById('{plot}').scrollIntoView({{behavior: 'instant'}})")
            self.wait(f"return document.querySelector('#{plot} .main-svg') !== null")

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def wait(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda _: self.run(script))

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = study_of("dense", "cola", "cola-dlr", title=HOSTILE)
    records = [*sweep_runs(study), *final_runs(study, planted({"cola": 0.1, "cola-dlr": 0.05}))]
    records = [replace(record, metrics=replace(record.measured, sample=HOSTILE)) for record in records]
    file = tmp_path_factory.mktemp("page") / "report.html"
    running = Unfinished(id=records[-1].id, step=3, loss=4.5)
    file.write_text(report_html(analyse(study, by_id(records[:-1]), [running])))
    return file


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_is_drawn_and_fits(browser: Page, small: Path, width: int, scheme: str) -> None:
    browser.open(small, width, scheme)
    assert browser.driver.get_log("browser") == []
    assert browser.requests() == [small.as_uri()]
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") == width
    # Each chart has marks, inside its box, in the colour of the scheme.
    charts = browser.run(
        "return [...document.querySelectorAll('.plot')].map(plot => ({id: plot.id,"
        " marks: plot.querySelectorAll('.scatterlayer path').length,"
        " inside: plot.querySelector('svg').getBoundingClientRect().right <= plot.getBoundingClientRect().right + 1}))"
    )
    assert len(charts) == 9
    assert all(chart["marks"] >= 2 and chart["inside"] for chart in charts), charts
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128
    assert dark == (scheme == "dark")


def test_nothing_in_a_hostile_study_runs(browser: Page, small: Path) -> None:
    browser.open(small, 360, "light")
    assert browser.driver.get_log("browser") == []
    assert browser.run("return [document.querySelector('h1').textContent, document.title]") == [HOSTILE, HOSTILE]
    assert browser.run("return document.querySelector('pre').textContent") == HOSTILE
    assert browser.run("return document.querySelectorAll('img').length + document.scripts.length") == 3


def test_charts_follow_the_scheme_while_the_page_is_open(browser: Page, small: Path) -> None:
    browser.open(small, 1280, "light")
    before = browser.run(LINE)
    browser.scheme("dark")
    browser.wait(f"{LINE} !== {json.dumps(before)}")
    browser.scheme("light")
    browser.wait(f"{LINE} === {json.dumps(before)}")


def test_a_chart_shows_another_view_and_hides_a_method_by_keyboard(browser: Page, small: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(small, 1280, "light")
    title = "return document.querySelector('#t1-curves .xtitle').textContent"
    assert browser.run(title) == "Training tokens"
    choose = browser.driver.find_element(By.CSS_SELECTOR, "select[data-chart='t1-curves']")
    choose.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    browser.wait(f"{title} === 'Training FLOPs'")

    lines = "return document.querySelectorAll('#t1-curves .scatterlayer .js-line').length"
    before = browser.run(lines)
    figure = choose.find_element(By.XPATH, "./ancestor::figure")
    figure.find_element(By.CSS_SELECTOR, "input[type=checkbox]").send_keys(Keys.SPACE)
    browser.wait(f"{lines} < {before}")


def test_the_keyboard_reaches_everything_and_focus_is_seen(browser: Page, small: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(small, 1280, "light")
    browser.run("scrollTo(0, 0); document.querySelector('.skip').focus()")
    assert browser.run("return document.activeElement.getBoundingClientRect().left") > 0
    reached = set()
    for _ in range(200):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        tag, outline = browser.run(
            "const e = document.activeElement; return [e.tagName + '.' + e.className, getComputedStyle(e).outlineStyle]"
        )
        if tag.startswith("BODY"):
            break
        assert outline != "none", tag
        reached.add(tag)
    assert {"A.", "DIV.scroll", "SELECT.", "INPUT.", "SUMMARY.", "PRE."} <= reached


def test_paper_is_white_also_from_a_dark_screen(browser: Page, small: Path) -> None:
    browser.open(small, 1280, "dark")
    dark = browser.run(LINE)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.wait(f"{LINE} !== {json.dumps(dark)}")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)"
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.wait(f"{LINE} === {json.dumps(dark)}")


def test_it_prints(browser: Page, small: Path) -> None:
    import base64

    browser.open(small, 1280, "light")
    paper = browser.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")
