"""Takes the picture of a report that the README shows: its first screen, in a headless browser.

python tools/report_picture.py RUN_DIR docs/report.png
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from distillax.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT, SCALE = 1060, 1288, 1.25  # CSS pixels, and picture pixels for each


def browser() -> str | None:
    """The browser's program, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(page: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Loads a page in headless Chromium, in a profile of its own that is thrown away, without network."""
    program = browser()
    if program is None:
        raise SystemExit("no browser is installed; run: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="distillax-browser-", ignore_cleanup_errors=True) as profile:
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            *arguments,
            page.resolve().as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)


def screenshot(
    page: Path, output: Path, width: int, height: int, scale: float = 1, dark: bool = False
) -> None:
    browse(
        page,
        f"--screenshot={output.resolve()}",
        f"--window-size={width},{height}",
        f"--force-device-scale-factor={scale}",
        "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )


def main(run: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "report.html", Path(folder) / "report.png"
        write_page([run], page)
        screenshot(page, picture, WIDTH, HEIGHT, SCALE)
        unfinished = output.with_name(output.name + ".tmp")
        shutil.copyfile(picture, unfinished)
        os.replace(unfinished, output)
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
