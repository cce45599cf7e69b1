"""Commands in processes of their own that can be killed, quickly begun."""

import multiprocessing
import sys

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = [  # commands import the last when they run, which would take most of their time
    "support.killing",
    "int4_lora.integration.cli.app",
    "int4_lora.integration.cli.conversion",
    "int4_lora.integration.conversion.merge",
]


def begin(arguments):
    """Begin ``int4-lora`` with arguments in a process whose imports are done; return it."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    child = CONTEXT.Process(target=_invoke, args=([str(one) for one in arguments],))
    child.start()
    return child


def _invoke(arguments):
    from typer.testing import CliRunner

    from int4_lora.integration.cli.app import app

    result = CliRunner().invoke(app, arguments)
    print(result.output, file=sys.stderr)
    sys.exit(result.exit_code)
