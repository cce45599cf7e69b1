"""Other projects' kernels as backends, one file each, imported only when they are run.

A peer that cannot be imported raises ImportError, which the scoreboard prints.

Source: ``docs/scoreboard.md``.
"""
