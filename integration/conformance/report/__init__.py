"""Reports: the outcomes of a run as one self-contained HTML page.

Start at ``page.py`` for what a page shows, at ``error_map.py`` for the heat maps, and at
``templates/`` for the HTML.

Source: ``docs/commands/conform.md``, "--report".
"""

from int4_lora.integration.conformance.report.drawing import check_can_draw
from int4_lora.integration.conformance.report.file import check_replaceable, write_report
from int4_lora.integration.conformance.report.page import run_page, scoreboard_page

__all__ = [
    "check_can_draw",
    "check_replaceable",
    "run_page",
    "scoreboard_page",
    "write_report",
]
