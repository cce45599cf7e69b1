"""Take single files out of a package's wheel, without installing it.

``python .ci/wheel_files.py FOLDER REQUIREMENT FILE...`` downloads the wheel, unpacks the files into
the folder under their names in the wheel, and deletes the wheel. If the folder has these files from
this version, nothing is done.

Used by tox: vLLM 0.33 cannot be installed beside 0.32, and the scoreboard needs one file of it.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main(folder, requirement, files):
    """Unpack the files, unless they are there."""
    done = Path(folder) / "unpacked.txt"
    wanted = "\n".join([requirement, *files])
    if done.is_file() and done.read_text() == wanted:
        return
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir"]
        options = ["--no-deps", "--only-binary", ":all:", "--dest", download]
        subprocess.run([*pip, *options, requirement], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in files:
                archive.extract(name, folder)
    done.write_text(wanted)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
