"""Stand-ins for the child processes of ``benchmarks``."""


class Answers:
    """A stand-in for ``benchmarks.child.Child``: answers at once, and records each command.

    Args:
        name: the name of the child.
        asked: the list for the records.
        answer: takes the command and its arguments, and returns the answer.
    """

    def __init__(self, name, asked, answer):
        self.name, self.asked, self._answer = name, asked, answer

    def ask(self, command, **arguments):
        self.asked.append((self.name, command, arguments))
        return self._answer(command, arguments)

    def pause(self):
        self.asked.append((self.name, "pause", None))

    def resume(self):
        self.asked.append((self.name, "resume", None))

    def cpu_seconds(self):
        return 0.25 * len(self.asked)  # as if a child computed while others run

    def close(self):
        self.asked.append((self.name, "close", None))


def assert_only_who_runs_goes_on(asked, commands=("run",)):
    """Check that each child is resumed for its command alone, and paused after it."""
    for start in range(0, len(asked), 3):
        (name, *_), *others = turn = asked[start : start + 3]
        resumed, command, paused = (command for _, command, _ in turn)
        assert (resumed, paused) == ("resume", "pause")
        assert command in commands
        assert all(other == name for other, *_ in others)
