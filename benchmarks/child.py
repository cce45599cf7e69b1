"""A child process that answers one command at a time, and does nothing in between.

Two engines of one model cannot share a process, and peak memory is counted per process. So each
contender has a process of its own, and the parent takes turns. Commands and answers are lines of
JSON. Whatever a child prints goes to its log. A waiting child may be stopped, since engines have
threads that poll for work.

Source: ``proc(5)`` for times and memory, ``prctl(2)`` for ending with the parent.
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
    """The parent's side.

    Args:
        module: run by ``python -m``; it calls ``serve``.
        log: file for whatever the child prints.
        environment: variables to add to the parent's.
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
        """Return the next answer, or None if the output has ended."""
        for line in self._process.stdout:  # what was printed before ``serve`` may come first
            if line.startswith(ANSWERS):
                return json.loads(line)
        return None

    def cpu_seconds(self):
        """Return the processor time of the process, or None without /proc."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def pause(self):
        """Stop the process, if the system can."""
        if STOPS:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        """Continue the process."""
        if STOPS:
            self._process.send_signal(signal.SIGCONT)

    def close(self):
        """End the process, stopped or not."""
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
    """Answer commands until there are no more: the child's side.

    Args:
        commands: functions by name, which take keywords and return what JSON can hold.
    """
    _end_with_the_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed goes to the log
    print(file=answers, flush=True)  # ends an unfinished line
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": commands[name](**arguments)}
        except Exception as error:  # the parent raises it; the process goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()  # the parent may read the log next
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_the_parent():
    """Have this process killed when its parent ends: a stopped one would stay forever."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_bytes():
    """Return this process's memory now and at the peak; None without /proc."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return {"now": None, "peak": None}
    sizes = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Vm"))
    now, peak = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}


def forget_the_peak():
    """Reset the peak of memory to the current use; return whether that is possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
