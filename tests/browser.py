"""A real browser without a screen, where there is one."""

import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def opened(page, tmp_path, script=""):
    """The elements of a page after its scripts, and what it complained of on the console.

    Args:
        page: path of the file.
        script: runs in the page after its own; what it gives to `show` is in the elements.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no browser here; install chromium to look at the pages as readers do")
    show = (
        "function show(text){const e=document.createElement('output');e.textContent=text;"
        "document.body.append(e)}"
    )
    copy = tmp_path / "looked-at.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{show}{script}</script></body>"))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,900",
        f"--user-data-dir={tmp_path / 'browser'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        "--dump-dom",
        copy.as_uri(),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    complaints = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return result.stdout, complaints


def shown(dom):
    """What the script gave to `show`."""
    return re.findall(r"<output>(.*?)</output>", dom, re.DOTALL)
