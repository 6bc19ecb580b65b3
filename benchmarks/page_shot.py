"""A picture of the page at / of a running server: one prompt at several K with exits, in the dark or in the
light.

    python -m benchmarks.page_shot --url http://127.0.0.1:8000 --out docs/images/page.png

Needs playwright and a Chromium (see tests/serve/test_page_browser.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer


def main(
    url: Annotated[str, typer.Option(help="The server.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    prompt: str = "And it came to pass",
    num_steps: Annotated[int, typer.Option(help="K of the slider.")] = 16,
    compare: Annotated[str, typer.Option(help="K to compare with.")] = "2, 4",
    tokens: int = 48,
    criterion: Annotated[str, typer.Option(help="Exit criterion, empty for none.")] = "latent-diff",
    threshold: Annotated[str, typer.Option(help="Of the exit, empty for the default.")] = "",
    width: int = 900,
    height: int = 760,
    dark: bool = False,
) -> None:
    """Fill the form, wait for all answers, write the picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_function("() => document.getElementById('k').max > 1")
        page.fill("#k", str(num_steps))
        fields = {"#prompt": prompt, "#compare": compare, "#tokens": str(tokens)} | (
            {"#threshold": threshold} if threshold else {}
        )
        page.select_option("#exit", criterion)
        for field, value in fields.items():
            page.fill(field, value)
        page.click("#go")
        page.wait_for_function("() => document.getElementById('said').textContent === 'done'")
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(out), full_page=True)
        browser.close()


if __name__ == "__main__":
    typer.run(main)
