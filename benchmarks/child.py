"""Another process that answers one command at a time, and does nothing in between.

Two engines of one model cannot share a process, and a process has one peak of memory; so each
contender has a process of its own, and the parent takes turns. Commands and answers are lines of
JSON. Whatever a child prints goes to its log. A child that waits may be stopped, since engines have
threads that look for work all the time.

Source: ``proc(5)`` for what a process has used, ``prctl(2)`` for ending with one's parent.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ANSWERS = ('{"answer": ', '{"error": ')
STOPS = hasattr(signal, "SIGSTOP")
PR_SET_PDEATHSIG = 1
LAST_LINES = 15  # of a log, shown when its process fails


class Child:
    """The parent's end.

    Args:
        module: what ``python -m`` runs; it calls ``serve``.
        log: file for whatever the child prints.
        environment: variables beside the parent's own.
        python: the interpreter; None means the parent's.
    """

    def __init__(self, module, log, environment=None, python=None):
        self.log = Path(log)
        with self.log.open("w", encoding="utf-8") as printed:
            self._process = subprocess.Popen(
                [python or sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, command, **arguments):
        """Return the answer to a command.

        Raises:
            RuntimeError: the command failed, or the process ended; the message ends with its log.
        """
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = None
        answer = answer or {"error": "the process ended"}
        if "error" in answer:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            shown = "\n".join(lines[-LAST_LINES:])
            raise RuntimeError(f"{command}: {answer['error']}\n{self.log} ends with:\n{shown}")
        return answer["answer"]

    def _answer(self):
        """Return the next line that is an answer, or None where there are no more lines."""
        for line in self._process.stdout:  # what was printed before ``serve`` may come first
            if line.startswith(ANSWERS):
                return json.loads(line)
        return None

    def cpu_seconds(self):
        """Return the processor time that the process has used, or None where there is no /proc."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def pause(self):
        """Stop the process, where there is a signal for that."""
        if STOPS:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        """Let the process go on."""
        if STOPS:
            self._process.send_signal(signal.SIGCONT)

    def close(self):
        """End the process, stopped or not: it has no more commands to wait for."""
        self.resume()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(commands):
    """Answer commands until there are no more: the child's end.

    Args:
        commands: by name, functions of keywords that return what JSON can hold.
    """
    _end_with_the_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints is no answer
    print(file=answers, flush=True)  # ends whatever was printed before
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": commands[name](**arguments)}
        except Exception as error:  # the parent says it; the process is still of use
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()  # the log has what was printed, before anybody reads it
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_the_parent():
    """Have this process killed when its parent is: a stopped one would be there for ever."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_bytes():
    """Return what this process holds and has held at most, or Nones where there is no /proc."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return {"now": None, "peak": None}
    sizes = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Vm"))
    now, peak = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}


def forget_the_peak():
    """Let the peak of memory start again from what is held now; return whether that is possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
