"""The report page in a browser: nothing is asked of a network, nothing is wider than the window, keys reach everything.

Needs Chromium and the packages playwright and axe-playwright-python.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse
from urllib.request import url2pathname

import pytest
from helpers_harness import sweep_options

from dynamax_lm_eval.reports import page
from dynamax_lm_eval.reports.command import report
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.sweep import command

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
#: A container has no sandbox for root, and what a browser asks for itself is no request of the page.
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WINDOWS = [(width, scheme) for width in (1400, 400) for scheme in ("light", "dark")]
#: The beginning of the title of a task is the folder of its model.
COMPARED = "#task={title}&point=state-skip-0.6&compare=pruning-deepest-1"
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter((found) => {
  const isScrolled = (box) => box && box !== document.body &&
    (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX) || isScrolled(box.parentElement));
  return !isScrolled(found.parentElement) && found.getBoundingClientRect().right > window.innerWidth + 0.5;
}).map((found) => found.outerHTML.slice(0, 120))"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium, or CHROMIUM=FILE)"),
]


@pytest.fixture(scope="module")
def address(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = command.sweep(sweep_options(model_folder, tmp_path_factory.mktemp("sweep") / "out", prune="1,2"))
    # The tiny model never stops by itself: of one task all points are left out.
    options = ReportOptions([str(folder)], bootstrap=20, draws=50, max_token_limit="tiny_generate=0.5")
    return (report(options) / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    reason = "needs the packages playwright and axe-playwright-python"
    pytest.importorskip("axe_playwright_python", reason=reason)
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield started
        started.close()


class Opened:
    """A page in a window of its own, and what it said and asked for."""

    def __init__(self, browser: Any, address: str, width: int = 1400, scheme: str = "light") -> None:
        # axe is put into the page, whose own policy allows no scripts from elsewhere.
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url.partition("#")[0]))
        self.page.goto(address)
        if "{title}" in address:
            self.page.goto(address.replace("{title}", self.title("tiny_generate")))
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def title(self, task: str) -> str:
        """The title of a task."""
        titles = self.page.locator("#task option").all_inner_texts()
        (found,) = [title for title in titles if title.endswith(f": {task}")]
        return str(found)

    def keys(self, *names: str) -> None:
        for name in names:
            self.page.keyboard.press(name)

    def words(self) -> dict[str, str]:
        """What the address says."""
        address = str(self.page.evaluate("location.hash")).removeprefix("#")
        return {name: values[0] for name, values in parse_qs(address).items()}

    def focused(self) -> str:
        return str(
            self.page.evaluate("document.activeElement.closest('tr')?.dataset.name ?? document.activeElement.id")
        )

    def rows(self) -> list[str]:
        found: list[str] = self.page.eval_on_selector_all("#points tbody tr", "rows => rows.map(r => r.dataset.name)")
        return found


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
@pytest.mark.parametrize("state", ["", COMPARED], ids=["as it opens", "two points"])
def test_nothing_is_asked_said_or_too_wide_and_everybody_can_read_it(
    browser: Any, address: str, width: int, scheme: str, state: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with Opened(browser, address + state, width, scheme) as opened:
        page = opened.page
        if state:
            page.click("text=Open all")
        page.wait_for_timeout(100)
        assert opened.said == []
        assert opened.asked == [address]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light dark"
        found = Axe().run(page).response
        assert len(found["passes"]) > 10
        grave = [
            (f["id"], f["nodes"][0]["html"]) for f in found["violations"] if f["impact"] in ("serious", "critical")
        ]
        assert grave == []


def test_the_table_stands_beside_the_chart_and_is_not_cut(browser: Any, address: str) -> None:
    with Opened(browser, address) as opened:
        chart, table = (opened.page.locator(name).bounding_box() for name in ("#chart", ".scroll"))
        assert table["x"] > chart["x"] + chart["width"] - 1
        assert opened.page.eval_on_selector(".scroll", "box => box.scrollWidth <= box.clientWidth")
    with Opened(browser, address, 1000) as opened:
        chart, table = (opened.page.locator(name).bounding_box() for name in ("#chart", ".scroll"))
        assert table["y"] > chart["y"] + chart["height"] - 1


def test_two_points_are_compared_by_few_keys_and_focus_stays(browser: Any, address: str) -> None:
    keys = ("Tab", "Enter", "ArrowDown", "Enter", "ArrowDown", "ArrowDown", "c")
    assert len(keys) <= 12
    with Opened(browser, address) as opened:
        opened.keys(*keys)
        rows = opened.rows()
        assert (opened.words()["point"], opened.words()["compare"]) == (rows[1], rows[3])
        assert opened.focused() == rows[3]
        assert opened.page.locator("#details .values thead th").all_inner_texts() == ["full model", "A", "B"]
        opened.keys("ArrowUp")
        assert opened.focused() == rows[2], "the arrow keys go on from the row that has the focus"
        opened.keys("Escape")
        assert "compare" not in opened.words() and opened.words()["point"] == rows[1]
        opened.keys("ArrowUp", "Enter")
        assert opened.focused() == "details-title", "Enter on the chosen row goes to its texts"
        opened.keys("Escape")
        assert opened.focused() == rows[1], "and Escape back"
        opened.keys("Escape")
        assert "point" not in opened.words() and opened.page.locator("#details").is_hidden()


def test_an_address_restores_what_was_shown(browser: Any, address: str) -> None:
    with Opened(browser, address) as opened:
        page = opened.page
        page.select_option("#task", label=opened.title("tiny_generate"))
        page.select_option("#metric", "consistency_exact")
        page.select_option("#x", "compute_vs_full")
        page.click("tr[data-name='state-skip-0.3'] .name")
        page.click("tr[data-name='full'] .versus")
        link = page.evaluate("location.href")
        shown = opened.words()
        assert (shown["metric"], shown["x"]) == ("consistency_exact", "compute_vs_full")
        assert (shown["point"], shown["compare"]) == ("state-skip-0.3", "full")
    with Opened(browser, link) as opened:
        assert opened.words() == shown
        assert opened.page.input_value("#metric") == "consistency_exact"
        assert opened.page.locator("tr.chosen").get_attribute("data-name") == "state-skip-0.3"
        assert opened.page.locator("tr.compared").get_attribute("data-name") == "full"
    with Opened(browser, f"{address}#task=gone&metric=gone&point=gone&compare=gone") as opened:
        assert "point" not in opened.words() and opened.said == []


def test_the_table_is_sorted_and_filtered(browser: Any, address: str) -> None:
    with Opened(browser, address) as opened:
        page = opened.page
        page.click("th[data-key='compute_vs_full'] button")
        column = page.locator("#points thead th").all_inner_texts().index("Run \N{MULTIPLICATION SIGN}")
        cells = page.locator(f"#points tbody td:nth-child({column + 1})").all_inner_texts()
        numbers = [float(cell.split()[0]) for cell in cells]
        assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) > 1
        assert page.get_attribute("th[data-key='compute_vs_full']", "aria-sort") == "descending"
        page.fill("#filter", "skip 0.6")
        assert opened.rows() == ["state-skip-0.6"]
        page.fill("#filter", "")
        page.click("text=pruning, deepest >> nth=0")
        assert not [name for name in opened.rows() if name.startswith("pruning")]


def test_points_that_are_left_out_are_hollow_with_the_reason(browser: Any, address: str) -> None:
    with Opened(browser, address + COMPARED) as opened:
        traces = opened.page.evaluate("document.getElementById('chart').data.map(t => [t.marker?.symbol, t.text])")
        hollow = [
            text
            for symbols, texts in traces
            if isinstance(symbols, list)
            for symbol, text in zip(symbols, texts, strict=True)
            if symbol.endswith("-open")
        ]
        assert len(hollow) == 6
        for text in hollow:
            assert re.search(r"left out:</b> .*\d+% of its texts end at the token limit, more than 50%", text)
        assert opened.page.locator("#legend").inner_text().split("\n")[-1] == "left out (6)"
        shown = opened.page.evaluate("document.getElementById('chart').layout.annotations.map(a => a.text)")
        assert sorted(shown) == ["0.3", "0.3", "0.6", "0.6", "1 block", "2 blocks"]


def test_tokens_are_read_out_by_pointer_and_by_key(browser: Any, address: str) -> None:
    with Opened(browser, address + COMPARED) as opened:
        page = opened.page
        marked = page.locator(".sample[open] .cell.break")
        assert marked.count() >= 2, "the full model's token, and the first that differs"
        reading = page.locator(".sample[open] .reading").first
        page.locator(".sample[open] .strips").first.focus()
        opened.keys("ArrowRight", "ArrowRight")
        said = reading.inner_text()
        assert (
            said.startswith("Token 2 of ") and "full model: “" in said and "; A: “" in said and " of 6 blocks" in said
        )
        page.locator(".sample[open] .column[data-token='0']").first.click()
        assert reading.inner_text().startswith("Token 1 of ")


def test_the_theme_is_chosen_and_kept(browser: Any, address: str) -> None:
    with Opened(browser, address) as opened:
        page = opened.page
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.select_option("#theme", "dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        page.reload()
        assert page.input_value("#theme") == "dark"


def test_the_chart_has_the_size_of_its_place(browser: Any, address: str) -> None:
    fits = """() => { const { width, height } = document.querySelector("#chart .main-svg").getBoundingClientRect();
      return Math.abs(width - chart.clientWidth) < 1 && Math.abs(height - chart.clientHeight) < 1; }"""
    with Opened(browser, address) as opened:
        page = opened.page
        assert page.evaluate(fits)
        page.select_option("#columns", "all")
        page.wait_for_function(fits)
        table, chart = page.locator(".scroll").bounding_box(), page.locator("#chart").bounding_box()
        assert table["y"] > chart["y"] + chart["height"], "all columns need the whole width"
        page.set_viewport_size({"width": 500, "height": 900})
        page.wait_for_function(fits)
        assert page.evaluate("document.documentElement.scrollWidth") <= 500


def test_a_point_that_is_chosen_in_the_chart_is_seen_in_the_table(browser: Any, address: str) -> None:
    seen = """() => { const row = document.querySelector("tr.chosen").getBoundingClientRect();
      const box = document.querySelector(".scroll").getBoundingClientRect();
      return row.top >= box.top && row.bottom <= box.bottom + 1; }"""
    with Opened(browser, address) as opened:
        page = opened.page
        page.add_style_tag(content=".scroll { max-height: 120px !important; }")
        page.evaluate("chart.emit('plotly_click', {points: [{customdata: 'pruning-deepest-2'}], event: {}})")
        assert opened.words()["point"] == "pruning-deepest-2"
        assert page.evaluate(seen)
        assert page.evaluate("window.scrollY") == 0


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_answers_are_shown_whole_and_what_is_read_stays_in_sight(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    with Opened(browser, address + COMPARED, width, scheme) as opened:
        page = opened.page
        page.add_style_tag(content=".cell.point { min-height: 12rem; }")  # as tall as a long answer
        page.locator(".sample[open] .strips").first.focus()
        opened.keys(*["ArrowRight"] * 30)
        page.wait_for_timeout(800)  # windows scroll smoothly
        assert page.eval_on_selector(".sample[open] .strips", "box => box.scrollHeight <= box.clientHeight + 1")
        assert page.eval_on_selector(
            ".sample[open] .strips", "box => !['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowY)"
        )
        inside = """box => { const { top, bottom } = box.getBoundingClientRect();
          return top >= -1 && bottom <= window.innerHeight + 1; }"""
        assert page.eval_on_selector(".sample[open] .reading", inside)
        last = page.locator(".sample[open] .column[data-token]").last
        last.scroll_into_view_if_needed()
        last.click()
        assert re.match(r"Token (\d+) of \1\.", page.locator(".sample[open] .reading").first.inner_text())
        assert opened.said == [] and page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_flat_metric_is_said_and_what_is_shown_instead(browser: Any, address: str) -> None:
    with Opened(browser, address + "#task={title}") as opened:
        page = opened.page
        assert page.input_value("#metric") == "consistency_rouge_l"
        line = "Exact match is 0.000 at every point."
        assert page.locator("#flat").inner_text() == f"{line} Shown instead: ROUGE-L with the full model."
        page.select_option("#metric", "exact_match,none")
        assert page.locator("#flat").inner_text() == line
        page.select_option("#metric", "consistency_exact")
        assert page.locator("#flat").is_hidden()


def test_a_front_of_one_point_is_neither_drawn_nor_in_the_legend(browser: Any, address: str, tmp_path: Path) -> None:
    text = Path(url2pathname(urlparse(address).path)).read_text(encoding="utf-8")
    (packed,) = re.findall(r'id="data">\n(\S+)\n', text)
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    band = "() => chart.data.filter(trace => trace.line?.width === 11).map(trace => trace.x.length)"
    for front, bands in (([0], []), ([0, 1], [2])):
        for task in data["tasks"]:
            task["fronts"] = {name: dict.fromkeys(data["axes"], front) for name in task["metrics"]}
        changed = tmp_path / "report.html"
        changed.write_text(text.replace(packed, page.packed(page.as_json(data))), encoding="utf-8")
        with Opened(browser, changed.as_uri()) as opened:
            assert opened.page.evaluate(band) == bands
            assert ("Pareto front" in opened.page.locator("#legend").inner_text()) == (len(front) > 1)
            assert opened.said == []
