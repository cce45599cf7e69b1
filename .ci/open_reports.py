"""Write reports and open them in headless Chromium; fail on an error in the console.

Run by ``tox run -e report``. A screenshot of each page is written beside it, to be looked at.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 3_000_000  # bytes of a page
WINDOW = "1280,3000"
COMMANDS = {  # the page, the command that writes it, and its exit code
    "reference": (["conform", "int4_lora.reference"], 0),
    "three-faults": (["conform", "support.conformance_faults:ThreeFaults"], 1),
    "scoreboard": (
        ["scoreboard", "--backends=reference,compressed_tensors,transformers,torch_int4pack"],
        0,
    ),
}
SHOWN = re.compile(r'id="shown"[^>]*>(\d+) of (\d+) entries<')


def browser():
    """Return the path of Chromium; exit with a message if it is not installed."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    return sys.exit("chromium is not on PATH; on Debian: apt-get install chromium")


def written(name, folder, options):
    """Write a page with the command line, and return its path."""
    command, code = COMMANDS[name]
    page = folder / f"{name}.html"
    program = Path(sys.executable).with_name("int4-lora")
    paths = {"PYTHONPATH": str(ROOT / "tests")}
    arguments = [str(program), *command, *options, "--report", str(page)]
    ended = subprocess.run(arguments, env={**os.environ, **paths}, check=False)
    if ended.returncode != code:
        sys.exit(f"{name}: the exit code is {ended.returncode}, not {code}")
    size = page.stat().st_size
    if size >= LARGEST:
        sys.exit(f"{name}: {size} bytes are too many")
    print(f"{page}: {size / 1e6:.2f} MB")
    return page


def opened(chromium, address, *options):
    """Open an address in Chromium; return what it prints, and exit on an error in the console."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            "--headless=new",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            f"--user-data-dir={profile}",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            *options,
            address,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    if said:
        sys.exit(f"{address}: the console says {said}")
    return ended.stdout


def main():
    """Write each page, open it, search in it, and take its screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where pages and screenshots are written")
    parser.add_argument("--quick", action="store_true", help="run a third of the cases")
    parser.add_argument("--pages", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    given = parser.parse_args()
    chromium = browser()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.pages:
        page = written(name, given.folder.resolve(), ["--quick"] if given.quick else [])
        screenshot = page.with_suffix(".png")
        screenshot.unlink(missing_ok=True)
        opened(chromium, page.as_uri(), f"--screenshot={screenshot}", f"--window-size={WINDOW}")
        if not screenshot.is_file():
            sys.exit(f"{name}: there is no screenshot")
        dumped = opened(chromium, f"{page.as_uri()}#search=g_idx+bf16", "--dump-dom")
        shown = SHOWN.search(dumped)
        if shown is None or not 0 < int(shown[1]) < int(shown[2]):
            sys.exit(f"{name}: the search for 'g_idx bf16' shows {shown and shown[0]}")
        print(f"{screenshot}: to be looked at; a search shows {shown[1]} of {shown[2]} entries")


if __name__ == "__main__":
    main()
