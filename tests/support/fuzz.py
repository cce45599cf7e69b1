"""Spoil a checkpoint and an adapter in many ways, and watch what the readers make of it.

Run from ``tests/``: ``python -m support.fuzz CHECKPOINT ADAPTER CASES SEED``. It exits with 0 and
prints a summary as JSON if every case is either read or refused with a message naming the folder,
within 10 seconds, with no file outside the folder opened; otherwise it prints the case.
"""

import copy
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from support.memory import peak_bytes

STRANGE = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1.5, float("nan"), "", "x", "re:(", "..",
           "/etc/passwd", "F64", "I64", "U8", "group", [], [0], [1, 2, 3], [-1, 5], [2**62, 4], {},
           {"a": 1}, "\ud800", "é" * 300, [[[]]], "128x128"]  # fmt: skip


def places(value, path=()):
    """Yield the path of every member of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in members:
            yield from places(member, (*path, key))


def spoil_json(value, rng):
    """Replace, remove or move one member of a JSON value."""
    paths = [path for path in places(value) if path]
    if not paths:
        return
    *parents, last = rng.choice(paths)
    parent = value
    for key in parents:
        parent = parent[key]
    how = rng.random()
    if how < 0.2:
        del parent[last]
    elif how < 0.3 and isinstance(parent, dict):
        parent[rng.choice(["", "weight", str(last) + "x", "weight_map"])] = parent.pop(last)
    else:
        parent[last] = copy.deepcopy(rng.choice(STRANGE))


def spoil_bytes(data, rng):
    """Flip, cut, repeat or overwrite some bytes."""
    data = bytearray(data)
    how = rng.randrange(5)
    at = rng.randrange(len(data))
    if how == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = data[: rng.randrange(64)]
    elif how == 3:
        data[:8] = rng.choice([0, 1, 7, 2**20, 2**40, 2**63, len(data)]).to_bytes(8, "little")
    else:
        data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def spoil_header(data, rng):
    """Change the header of a safetensors file and keep the rest."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.randrange(1, 3)):
        spoil_json(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def spoil(folder, rng):
    """Spoil one file of a folder and return its name and how."""
    file = rng.choice([file for file in sorted(folder.iterdir()) if file.suffix != ".md"])
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(data)
        for _ in range(rng.randrange(1, 3)):
            spoil_json(value, rng)
        file.write_text(json.dumps(value), encoding="utf-8")
        return file.name, "json"
    if file.suffix == ".safetensors" and rng.random() < 0.6:
        file.write_bytes(spoil_header(data, rng))
        return file.name, "header"
    file.write_bytes(spoil_bytes(data, rng))
    return file.name, "bytes"


def read(folder, kind):
    """Read everything there is to read."""
    from int4_lora.integration import open_checkpoint, read_adapter
    from int4_lora.integration.checkpoint.inspect import inspect

    if kind == "adapter":
        read_adapter(folder)
        return
    checkpoint = open_checkpoint(folder)
    inspect(checkpoint)
    for name in checkpoint.modules():
        checkpoint.packed_weight(name)


def watch():
    """Return (watched, outside): what is opened outside the folders in ``watched``, if any.

    Python itself may open its own modules.
    """
    watched, outside = [], []
    ours = tuple(str(Path(path).resolve()) for path in sys.path if path)

    def opened(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            path = str(Path(arguments[0]).absolute())
            own = (*watched, sys.prefix, sys.base_prefix, *ours)
            if watched and not path.startswith(own):
                outside.append(path)

    sys.addaudithook(opened)
    return watched, outside


def main(checkpoint, adapter, cases, seed):
    """Run the cases; see the module."""
    sources = {"checkpoint": Path(checkpoint), "adapter": Path(adapter)}
    counts = Counter()
    with tempfile.TemporaryDirectory() as root:
        for kind, source in sources.items():
            read(source, kind)  # imports what there is to import, and must work
        watched, outside = watch()
        for case in range(cases):
            rng = random.Random(f"{seed}/{case}")
            kind = rng.choice(list(sources))
            folder = Path(shutil.copytree(sources[kind], Path(root) / f"case{case}"))
            what = (case, kind, *spoil(folder, rng))
            signal.alarm(10)
            watched[:] = [str(folder)]
            try:
                read(folder, kind)
                counts["read"] += 1
            except (OSError, TypeError, ValueError) as error:
                counts[type(error).__name__] += 1
                if str(folder) not in str(error):
                    traceback.print_exc()
                    sys.exit(f"case {what}: the message does not name the folder: {error}")
            except BaseException:
                traceback.print_exc()
                sys.exit(f"case {what}: not refused in words")
            signal.alarm(0)
            watched.clear()
            if outside:
                sys.exit(f"case {what}: opened {outside}")
            shutil.rmtree(folder)
    print(json.dumps({"cases": cases, "peak_bytes": peak_bytes(), **counts}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
