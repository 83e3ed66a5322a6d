"""The browser for tests/test_studio_browser.py. As a program: sees to it that there is one, or says loudly that there is none.

On a continuous-integration machine (CI is set, one is root) Debian's Chromium is installed. Elsewhere nothing is installed
unasked: it says how.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-dejavu-core")
SECONDS = 900  # to install it
MISSING = (
    "NO BROWSER, SO THE STUDIO IS NOT TESTED IN ONE: install Chromium ('apt-get install chromium', or 'playwright install "
    "chromium'), or name one with MOKUS_BROWSER."
)


def find() -> str | None:
    """The program: the one that MOKUS_BROWSER names, the system's, or playwright's own."""
    if named := os.environ.get("MOKUS_BROWSER"):
        return named
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


def install() -> None:
    """Debian's Chromium; what goes wrong is said, and is no error."""
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
        except subprocess.TimeoutExpired:
            print(f"{' '.join(command)}: no end after {SECONDS} s", file=sys.stderr)
            return
        if done.returncode:
            print(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return


def main() -> None:
    """See to it that there is a browser, if that can be done here."""
    if find() is None and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing Chromium, for the tests of the studio", file=sys.stderr)
        install()
    if find() is None:
        print(f"\n{'*' * 120}\n{MISSING}\n{'*' * 120}\n", file=sys.stderr)


if __name__ == "__main__":
    main()
