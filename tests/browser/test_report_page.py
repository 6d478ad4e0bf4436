"""The report in a real headless Chromium: it renders, fetches nothing, says nothing, and can be read by everyone."""

import json
import os
import re
import shutil
from base64 import b64decode

import anndata
import numpy as np
import pandas as pd
import pytest
from problems import low_rank_counts

from scialm_dask import impute, write_report

FIGURES = 6
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def program(*names):
    """Find one of these, or skip; in CI they must be there."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        why = f"none of {', '.join(names)} is installed; on Debian: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with all its sections, warnings, and names that would run if they could."""
    counts = low_rank_counts(90, 60, density=0.6, rank=3, dispersion=4, seed=1)
    bad = "<img src=http://localhost:1/x onerror=alert(1)>"
    genes = [f"{bad}{j}" for j in range(60)]
    obs = pd.DataFrame({"type": np.where(np.arange(90) % 3, bad, "b" * 80)}, index=[f"cell{i}" for i in range(90)])
    cells = anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    result = impute(cells, preset="complete", validation=0.1, max_rank=20)
    result.summary["mean_imputed_over_observed"] = 2.5
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(result, path, source=cells, color="type")
    return path.as_uri()


@pytest.fixture(params=[(scheme, width) for scheme in ("light", "dark") for width in (1200, 360)], ids=str)
def opened(browser, page, request):
    """Open the page in a scheme and a width; give back what was sent for, and what the console said."""
    scheme, width = request.param
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return browser, width, sent, browser.get_log("browser")


def test_it_renders_and_nothing_is_fetched(opened, page):
    browser, _, sent, console = opened
    assert [url for url in sent if not url.startswith("data:")] == [page]
    assert console == []
    assert browser.execute_script("return document.scripts.length") == 0
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('img')].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert len(sizes) == FIGURES
    assert all(complete and drawn > 100 and width > 200 and height > 100 for complete, drawn, width, height in sizes)


def test_every_figure_has_a_name_and_a_description(opened):
    browser, *_ = opened
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    names = [node["name"]["value"] for node in images]
    assert len(names) == FIGURES
    assert len(set(names)) == FIGURES
    assert all(len(name.split()) > 10 for name in names)  # what it shows, not only what it is


def test_nothing_runs_over_the_edge(opened):
    browser, width, *_ = opened  # the width itself: a phone widens its window for a page that is too wide
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > arguments[0] + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


CONTRASTS = """
const rgb = text => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text; c.fillRect(0, 0, 1, 1);
                      return [...c.getImageData(0, 0, 1, 1).data]; };
const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                                                       if (c[3] === 255) return c; } return [255, 255, 255]; };
const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
const found = [];
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const ink = rgb(style.color);
  const levels = [ground(e), ...(e.matches('.share') ? [rgb(style.getPropertyValue('--bar'))] : [])].map(light);
  for (const level of levels) {
    const [low, high] = [light(ink), level].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), e.textContent.trim().slice(0, 40)]);
  }
}
return found;
"""


def test_all_letters_stand_out(opened):
    """At least 4.5 to 1, what WCAG asks of text (level AA), in light and dark."""
    contrasts = opened[0].execute_script(CONTRASTS)
    assert len(contrasts) > 150
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []


def test_letters_in_figures_stand_out_too(opened):
    browser, *_ = opened
    card = browser.execute_script("return getComputedStyle(document.querySelector('figure')).backgroundColor")
    ground = luminance([int(part) for part in re.findall(r"\d+", card)[:3]])
    for picture in browser.execute_script("return [...document.querySelectorAll('img')].map(i => i.currentSrc)"):
        svg = b64decode(picture.partition(",")[2]).decode()
        inks = set(re.findall(r"<text[^>]*fill: #([0-9a-f]{6})", svg))
        assert inks
        for ink in inks:
            low, high = sorted([ground, luminance(list(bytes.fromhex(ink)))])
            assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(colour):
    """Relative, of red, green and blue up to 255, as WCAG defines it."""
    parts = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_no_row_is_half_empty(opened):
    """Cards reach the right edge, also the last one where their number is odd."""
    ends = opened[0].execute_script("""
        document.querySelector('.panels figure').remove();  // five are left, three of them in this row
        return [...document.querySelectorAll('.panels, .tiles')].map(row => [
            row.getBoundingClientRect().right, ...[...row.children].map(e => e.getBoundingClientRect()).filter(
                (box, n, all) => n + 1 === all.length || all[n + 1].top > box.top + 5).map(box => box.right)])""")
    assert len(ends) == 3
    assert all(abs(right - edge) < 1 for edge, *rights in ends for right in rights)


def test_light_and_dark_differ(browser, page):
    grounds = set()
    for scheme in ("light", "dark"):
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        browser.get(page)
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
