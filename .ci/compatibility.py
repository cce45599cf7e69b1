"""Write the table of docs/compatibility.md from tox's JSON record of a run.

``tox run -m matrix --result-json matrix.json && python .ci/compatibility.py matrix.json``
replaces the text between the page's two marks. Given several records, an environment's result in a
later record replaces its result in earlier records.
"""

import datetime
import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
MARKS = ("<!-- table: written by .ci/compatibility.py -->", "<!-- end of the table -->")
PACKAGES = ("torch", "compressed-tensors", "transformers", "peft")
COLUMNS = ("environment", *PACKAGES, "tests", "minutes", "result")


def row(name, record):
    """Return the table cells of one environment."""
    packages = record.get("installed_packages", [])
    versions = dict(re.split(r"==| @ ", package, maxsplit=1) for package in packages)
    outputs = "".join(test["output"] for test in record.get("test", []))
    tests = ", ".join(re.findall(r"^=+ (.*) in [\d.]+s", outputs, flags=re.M))
    tests = tests or ("its own script" if packages else "not installed")
    result = record["result"]
    return [
        f"`{name}`",
        *(versions.get(package, "") for package in PACKAGES),
        tests,
        f"{result['duration'] / 60:.1f}",
        "passed" if result["success"] else "**failed**",
    ]


def table(record, today):
    """Return the table of all environments that ran, with the date and the machine."""
    ran = {
        name: environment
        for name, environment in record["testenvs"].items()
        if environment.get("result")
    }
    known = [environment["python"] for environment in ran.values() if environment.get("python")]
    pythons = {python["version"].split()[0] for python in known}
    machines = {python["machine"] for python in known}
    lines = [
        f"Run on {today}: {record['platform']} {', '.join(sorted(machines))}, CPU only, "
        f"Python {', '.join(sorted(pythons))}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row(name, environment)) + " |" for name, environment in ran.items()),
    ]
    return "\n".join(lines)


def main(results):
    """Write the new table into the page."""
    record, *later = [json.loads(Path(result).read_text()) for result in results]
    for one in later:
        ran = {name: env for name, env in one["testenvs"].items() if env.get("result")}
        record["testenvs"].update(ran)
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    written = table(record, datetime.date.today().isoformat())
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{written}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
