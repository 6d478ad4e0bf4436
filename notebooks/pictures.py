"""Make the README's picture: ``SCIALM_DATA=FOLDER python notebooks/pictures.py``; needs Chromium and selenium."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

import scialm_dask

FIGURES = Path(__file__).resolve().parent / "figures"
WIDTH, HEIGHT = 760, 1000


def photograph_report() -> None:
    """Put two views of the report on sorted blood cells side by side: its top in light, its cells in dark."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        result = scialm_dask.impute(Path(os.environ["SCIALM_DATA"], "data", "pbmc_facs.h5ad"))
        scialm_dask.write_report(result, page, color="cell_type")
        views = [view(page, "light", ""), view(page, "dark", "Cells before and after")]
    both = Image.new("RGB", (sum(image.width for image in views), HEIGHT))
    both.paste(views[0], (0, 0))
    both.paste(views[1], (views[0].width, 0))
    both.quantize(128).save(FIGURES / "report.png", optimize=True)


def view(page: Path, scheme: str, heading: str) -> Image.Image:
    """Photograph a page as it is seen in a colour scheme, from a heading on, or from the top."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", f"--window-size={WIDTH},{HEIGHT + 200}", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options)
    try:
        scheme_of_page = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_of_page]})
        driver.get(page.as_uri())
        if heading:
            driver.execute_script(
                "[...document.querySelectorAll('h2')].find(h => h.textContent == arguments[0]).scrollIntoView()",
                heading,
            )
        image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    finally:
        driver.quit()
    return image.crop((0, 0, image.width, HEIGHT))


if __name__ == "__main__":
    photograph_report()
