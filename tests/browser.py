"""A real browser without a window, for the tests of pages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

IN_A_BROWSER = [
    pytest.mark.apart,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
    ),
]

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--allow-file-access-from-files",
)

SIZES = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]

BAD = {"serious", "critical"}
"""What axe-core calls a finding that keeps somebody out."""


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

    def serious(self) -> list[str]:
        """What axe-core finds that keeps somebody out, in a line each."""
        # Past the policy of the page, which lets no script in that does not stand in it.
        axe = files("axe_core_python").joinpath("axe.min.js").read_text()
        self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
        found = self.driver.execute_async_script("axe.run({resultTypes: ['violations']}).then(arguments[0])")
        return [
            f"{violation['id']}: {violation['nodes'][0]['html'][:160]}"
            for violation in found["violations"]
            if violation["impact"] in BAD
        ]

    def reached_by_keyboard(self, most: int = 400) -> set[str]:
        """What the tab key comes to, as tag and class, each with a focus that is seen."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        reached = set()
        for _ in range(most):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            tag, outline = self.run(
                "const e = document.activeElement, s = getComputedStyle(e);"
                "return [e.tagName + '.' + e.className, s.outlineStyle + s.boxShadow]"
            )
            if tag.startswith("BODY"):
                break
            assert outline != "nonenone", tag
            reached.add(tag)
        return reached


@contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """The browser, with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    driver.set_script_timeout(200)
    try:
        yield Page(driver)
    finally:
        driver.quit()
