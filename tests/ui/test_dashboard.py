"""What a person sees after `make ui`: in a real Chromium, on a sweep, a single run and a report made here.

With GAPLAB_SCREENSHOTS=<folder> the sweep is larger and each page is saved there, for docs/dashboard.md.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from gaplab import config as configs
from gaplab.tracking import dashboard

SHOTS = os.environ.get("GAPLAB_SCREENSHOTS") or None
SEEDS = 6 if SHOTS else 3
SMALL = ["data.train_size=2000", "data.valid_size=2000", "trainer.max_epochs=6"]
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1600,1000",
]  # fmt: skip
UNFOLD = "button[data-component-id$='show_comment_text_toggle']"
EXPANDER = "button[data-component-id*='runs_cells_r']"
WAIT_S = 60.0


@dataclass
class Dashboard:
    """What was printed by `make ui`, and what is in its store."""

    server: str
    views: dict[str, str]
    experiment: str
    sweep: str
    single: str
    children: list[str]
    names: list[str]

    def run(self, run_id: str, tab: str = "") -> str:
        return f"{self.server}/#/experiments/{self.experiment}/runs/{run_id}{tab}?workflowType=machine_learning"


class Browser:
    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # a page that differs in what follows # alone is not loaded anew
        self.driver.get(address)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """What `condition` gives, as soon as there is something."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            if time.monotonic() > deadline:
                pytest.fail(f"{what} is not on {self.driver.current_url}\n{self.text()[:1000]}")
            time.sleep(0.1)

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def says(self, *words: str) -> None:
        for word in words:
            self.until(f"{word!r}", lambda word=word: word in self.text())

    def shoot(self, name: str) -> None:
        """What is seen now, reduced to 256 colours."""
        if SHOTS is None:
            return
        path = Path(SHOTS).resolve() / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))
        Image.open(path).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
        assert path.stat().st_size < 250_000


def python(script: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(configs.PROJECT / "src" / script), *words], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def outputs() -> Iterator[Path]:
    """A short name, for it is seen on the pages."""
    folder = Path(tempfile.gettempdir()) / ("gaplab-demo" if SHOTS else f"gaplab-demo-{os.getpid()}")
    folder.mkdir()
    try:
        python("train.py", f"paths.outputs={folder}", "model.bn=true", *SMALL)
        grid = [
            "model.bn=false,true",
            "model.dropout=0,0.5",
            "model.init=kaiming_normal",
            f"seed=range({SEEDS})",
            "figures=true",
        ]
        python("train.py", "-m", "claim=overfitting", f"paths.outputs={folder}", *grid, *SMALL)
        python("report.py", f"paths.outputs={folder}")
        yield folder
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(outputs: Path) -> Iterator[Dashboard]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("gaplab").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (sweep,) = [run for run in runs if run.data.tags.get("claim")]
    (single,) = [run for run in runs if run not in children and run is not sweep]
    port = 5000 if SHOTS else free_port()
    process = subprocess.Popen(
        ["make", "ui", f"PORT={port}", f"OUTPUTS={outputs}"],
        cwd=configs.PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = {}
        for line in process.stdout:  # ends when the server does not come, after 90 s
            if found := re.match(r"(runs|conditions) +(http\S+)$", line):
                said[found[1]] = found[2]
            if line.startswith("Ctrl-C"):
                break
        server = f"http://127.0.0.1:{port}"
        assert said == dashboard.addresses(server, experiment)
        yield Dashboard(
            server,
            said,
            experiment,
            sweep.info.run_id,
            single.info.run_id,
            [run.info.run_id for run in children],
            [run.info.run_name for run in children],
        )
    finally:
        process.terminate()  # make hands it on
        process.communicate(timeout=30)
        with socket.socket() as probe:  # nobody is left behind
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.driver.quit()


@pytest.fixture(scope="module")
def page(browser: Browser, served: Dashboard) -> Browser:
    """MLflow opens its assistant at the first visit; who has closed it once does not see it again."""
    browser.open(served.views["runs"])
    close = browser.until("the assistant", lambda: browser.all("button[data-component-id$='chat_panel.close']"))
    close[0].click()
    browser.until("no assistant", lambda: not browser.all("button[data-component-id$='chat_panel.close']"))
    return browser


def names_in_list(page: Browser) -> list[str]:
    """Of the runs, from top to bottom."""
    rows = page.all(".ag-pinned-left-cols-container .ag-row")
    rows.sort(key=lambda row: int(row.get_attribute("row-index") or 0))
    return [link.text for row in rows for link in row.find_elements(By.CSS_SELECTOR, "a[href*='/runs/']")]


def test_the_list_has_the_columns_that_matter_and_runs_below_their_sweep(page: Browser, served: Dashboard):
    page.open(served.views["runs"])
    columns = [one.split("`")[1] for one in dashboard.COLUMNS]

    def headings() -> list[str]:
        cells = sorted(page.all(".ag-header-cell"), key=lambda cell: cell.location["x"])
        return [name for cell in cells if (name := cell.text.strip()) in columns]

    page.until("the columns, in order", lambda: headings() == columns)
    page.until("a sweep and a run", lambda: len(names_in_list(page)) == 2)
    assert names_in_list(page)[0].startswith("sweep overfitting")
    assert names_in_list(page)[1] == "mlp bn s0"
    page.until("a plus sign", lambda: page.all(EXPANDER))[0].click()
    page.until("the runs of the sweep", lambda: len(names_in_list(page)) >= min(12, 2 + len(served.names)))
    assert names_in_list(page)[1:8] == served.names[:7]
    page.says("How large is the overfitting gap")
    page.shoot("runs")


def test_the_description_of_the_experiment_says_what_the_columns_mean(page: Browser, served: Dashboard):
    page.open(served.views["runs"])
    page.says("How large is the overfitting gap")
    page.until("the arrow", lambda: page.all("button[data-component-id$='metadata_editor.expand_button']"))[0].click()
    page.says("what most tools call train accuracy")
    page.shoot("experiment")


def test_the_sweep_says_what_was_asked_and_found(page: Browser, served: Dashboard):
    page.open(served.run(served.sweep))
    runs = len(served.children)
    page.until("the whole description", lambda: page.all(UNFOLD))[0].click()
    page.says(configs.QUESTIONS["overfitting"], f"{runs} of {runs} runs finished", "Effects of what was varied")
    page.says("What was asked", "model.dropout", f"seeds 0 to {SEEDS - 1}", "python src/train.py -m claim=overfitting")
    assert "|" not in page.until("a table", lambda: page.all("table"))[0].text
    page.shoot("sweep")


def test_a_run_shows_its_result_metrics_and_figures(page: Browser, served: Dashboard):
    page.open(served.run(served.children[0]))
    page.says("with its 95 % interval", "train/acc", "gap/acc", "best valid")
    page.until("the whole description", lambda: page.all(UNFOLD))[0].click()
    page.says("parameters")
    page.shoot("run")
    page.open(served.run(served.children[0], "/artifacts/figures/learning_curves.png"))
    page.says("learning_curves.png", "confusion_matrix.png")
    page.until(
        "the picture",
        lambda: page.driver.execute_script(
            "return [...document.images].some(one => one.naturalWidth > 500) || "
            "[...document.querySelectorAll('canvas, .js-plotly-plot image, svg image')].length > 0"
        ),
    )
    page.shoot("figure")


def charts(page: Browser) -> list[list[Any]]:
    """Title, lines and bars of each chart, from top to bottom."""
    return page.driver.execute_script(
        """
        const cards = [...document.querySelectorAll("[data-testid='experiment-view-compare-runs-card']")];
        return cards.map((card) => [
            card.innerText.split("\\n")[0],
            card.querySelectorAll(".scatterlayer path.js-line").length,
            card.querySelectorAll(".barlayer .point").length,
        ]);
        """
    )


def test_the_charts_of_train_valid_and_gap_come_first_as_means_over_seeds(page: Browser, served: Dashboard):
    page.open(served.views["conditions"])
    arms = 5  # four conditions and the single run

    def lines() -> bool:
        found = charts(page)[:3]
        return [name for name, _, _ in found] == ["train/acc", "valid/acc", "gap/acc_pp"] and all(
            count >= arms for _, count, _ in found
        )

    page.until("the curves", lines)
    page.says("Train, valid and gap\n(3)")
    page.until("the conditions", lambda: "bn=true dropout=0.5" in page.driver.page_source)
    page.shoot("conditions")

    def bars() -> bool:
        """Charts are drawn when they come into view."""
        for section in page.all("[data-testid='experiment-view-compare-runs-section-header']")[1:2]:
            page.driver.execute_script("arguments[0].scrollIntoView()", section)
        found = [name for name, _, count in charts(page) if count == arms]
        return found == ["test/acc", "valid/acc", "gap/acc_pp"]

    page.until("the bars", bars)


def test_the_report_is_read_among_the_artifacts_of_the_sweep(page: Browser, served: Dashboard):
    page.open(served.run(served.sweep, "/artifacts/report/report.html"))
    frame = page.until("the page", lambda: page.all("iframe"))[0]

    def content() -> str:
        page.driver.switch_to.frame(frame)
        try:
            return page.text()
        except WebDriverException:
            return ""
        finally:
            page.driver.switch_to.default_content()

    page.until("the report", lambda: configs.QUESTIONS["overfitting"] in content())
    page.shoot("report")


def test_two_runs_are_compared(page: Browser, served: Dashboard):
    pair = [served.children[served.names.index(name)] for name in ("mlp s0", "mlp bn s0")]
    runs, experiments = (json.dumps(ids, separators=(",", ":")) for ids in (pair, [served.experiment]))
    page.open(f"{served.server}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning")
    page.says("Comparing 2 Runs", "model.bn", "gap/acc")
    page.until("a chart", lambda: page.all(".js-plotly-plot"))
    page.shoot("compare")
