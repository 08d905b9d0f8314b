"""bench.html in a real browser: no network, no errors, phones, dark mode, keyboard."""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nsp.benchmarks.contest.pictures import Pictures
from nsp.benchmarks.contest.sweep import sweep_scenarios
from nsp.benchmarks.record.parity import Flip
from nsp.benchmarks.record.result import BenchResult, Entry, GuidancePoint, SweepPoint
from nsp.benchmarks.render.page import page
from nsp.benchmarks.render.section import ms
from nsp.benchmarks.render.svg import COLORS

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PARTS = ("latency", "ceilings", "parity", "pictures", "growth", "memory", "environment")

# Text whose contrast with what is behind it is below WCAG AA, and elements wider than the page.
PALE = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = c => parse(c).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor, p = parse(c);
      if (p.length < 4 || p[3] > 0) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = texts.nextNode(); n; n = texts.nextNode()) {
    const e = n.parentElement;
    if (!n.data.trim() || e.closest('.skip') || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const a = light(e.closest('svg') ? style.fill : style.color), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([n.data.trim(), ratio]);
  }
  return found;
}"""


def pictures() -> Pictures:
    expected = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    found = expected.copy()
    found[1, 0, 0, 0] ^= 1
    return Pictures("torch", "engines", ("red apple", "a dove"), expected, found)


PICTURES = pictures()


@pytest.fixture(scope="module")
def whole(result: BenchResult) -> str:
    """A page with everything that can be on one."""
    assert result.parity is not None
    flips = tuple(
        Flip(image=0, step=1, position=n, expected=1, drawn=2, margin=1e-4 * n, cdf_error=2e-4)
        for n in range(1, 4)
    )
    scenarios = sweep_scenarios(cores=2, max_batch=None)
    observations = result.batches[0].observations
    full = dataclasses.replace(
        result,
        parity=dataclasses.replace(result.parity, flips=flips, num_flips=3),
        sweep=tuple(SweepPoint(scenario=s, observations=observations) for s in scenarios),
        guidance=tuple(
            GuidancePoint(
                guided_scales=n,
                times_ms=(2.0 + n, 2.1 + n),
                token_agreement=0.5,
                psnr_db=(None if n == 4 else 20.0 + n,),
            )
            for n in (4, 3, 2)
        ),
        others=(Entry(name="plain-onnx", what="<b>plain</b>", missing="no & such thing"),),
        warnings=(),
        trusted=True,
    )
    return page(full, PICTURES)


def test_the_page_is_whole_and_alone(whole: str, result: BenchResult) -> None:
    for part in PARTS:
        assert f'id="{part}"' in whole
    for scheme in COLORS:
        assert whole.count(f'<svg class="plot {scheme}"') == 10
    assert "<script" not in whole
    addresses = re.findall(r'(?:src|href)="([^"]*)"', whole)
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import|@font-face", whole)
    names = re.findall(r'\bid="([^"]+)"', whole)
    assert len(names) == len(set(names))
    for target in re.findall(r'(?:href="#|aria-labelledby="|url\(#)([^")]+)', whole):
        assert target in names, target
    assert "&lt;b&gt;plain&lt;/b&gt;" in whole
    assert "Identical pixels." in whole
    assert "largest difference 1 of 255" in whole
    assert f"{ms(result.batches[0].end_to_end.contender.p50)} ms" in whole
    assert not re.search(r"\de\+0[1-9]", re.sub(r"<svg.*?</svg>", "", whole, flags=re.DOTALL))


@pytest.mark.parametrize("scheme", COLORS)
def test_text_of_plots_is_text_in_the_colours_of_the_page(whole: str, scheme: str) -> None:
    own = set(COLORS[scheme].values())
    others = {value for values in COLORS.values() for value in values.values()} - own
    plots = re.findall(rf'<svg class="plot {scheme}".*?</svg>', whole, re.DOTALL)
    assert plots
    for plot in plots:
        assert "<text" in plot
        assert COLORS[scheme]["ink"] in plot
        assert not others & set(re.findall("#[0-9a-f]{6}", plot))
        assert "DejaVu" not in plot


def test_a_run_that_is_not_trusted_shows_no_ratio_and_says_why(result: BenchResult) -> None:
    doubted = dataclasses.replace(result, warnings=("others were at work",), trusted=False)
    text = page(doubted, None)
    assert "Why this run is not trusted" in text
    assert "others were at work" in text
    assert "×" not in text
    assert not re.search(r"\d\.\d\dx", text)
    trusted = page(dataclasses.replace(result, warnings=(), trusted=True), None)
    assert f"{result.batches[0].end_to_end.speedup:.2f}×" in trusted
    assert "Why this run" not in trusted


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; Debian, Ubuntu: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def shown(browser: Any, whole: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page on a phone in dark mode, with everything opened, and what the browser said."""
    path = tmp_path_factory.mktemp("page") / "bench.html"
    path.write_text(whole)
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    tab = context.new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: tab.said.append(request.url))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield tab
    context.close()


def test_the_browser_has_nothing_to_complain_of_and_asks_for_nothing(shown: Any) -> None:
    others = [text for text in shown.said if not text.startswith(("file:", "data:"))]
    assert others == []
    assert sum(text.startswith("file:") for text in shown.said) == 1


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(shown: Any, width: int) -> None:
    shown.set_viewport_size({"width": width, "height": 740})
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    shown.set_viewport_size({"width": 360, "height": 740})


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_all_text_stands_out_from_what_is_behind_it(shown: Any, scheme: str) -> None:
    shown.emulate_media(color_scheme=scheme)
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert shown.evaluate(PALE) == []


def test_the_text_of_plots_can_be_read_on_a_phone(shown: Any) -> None:
    heights = shown.evaluate(
        "[...document.querySelectorAll('svg.plot text')]"
        ".filter(t => t.textContent.trim().length > 2)"
        ".map(t => t.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(heights) >= 8


def test_the_keyboard_reaches_everything_in_order(shown: Any) -> None:
    focusable = "a[href], summary, [tabindex='0']"
    total = shown.evaluate(f'document.querySelectorAll("{focusable}").length')
    shown.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(total):
        shown.keyboard.press("Tab")
        reached.append(
            shown.evaluate(
                f'[...document.querySelectorAll("{focusable}")].indexOf(document.activeElement)'
            )
        )
    assert reached == list(range(total))
    outline = shown.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # one sees where one is


def test_the_outline_is_one_for_people_who_listen(shown: Any) -> None:
    assert shown.evaluate("document.documentElement.lang") == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert shown.locator(landmark).count() == 1
    levels = shown.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert shown.evaluate("[...document.images].every(i => i.alt && i.naturalWidth)")
    assert shown.evaluate("[...document.querySelectorAll('table')].every(t => t.caption)")
