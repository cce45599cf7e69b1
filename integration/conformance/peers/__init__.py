"""Other people's code as backends, each in a file of its own; imported only when it is asked.

What cannot be imported raises ImportError, which the scoreboard prints.

Source: ``docs/scoreboard.md``.
"""
