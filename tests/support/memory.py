"""The most memory that this process has held."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes():
    """Return the peak of the resident set since this program started.

    Not getrusage's ru_maxrss: that one survives exec, so a child of a large process begins with
    the parent's size.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
