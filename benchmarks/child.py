"""Run a contender in a child process that answers one command at a time and then waits.

Two engines of one model cannot share a process, and peak memory is counted per process. So each
contender runs in a separate process, and the parent commands them in turn. Commands and answers are
lines of JSON. A child's other output goes to its log. The parent can stop a waiting child, because
engines have threads that poll for work.

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
LAST_LINES = 15  # of the log, shown when its process fails


class Child:
    """A child process, as its parent sees it.

    Args:
        module: the module to run with ``python -m``; it calls ``serve``.
        log: the file for the child's output.
        environment: variables to add to the parent's environment.
        python: the child's interpreter; None means the parent's.
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
        """Send a command and return its answer.

        Raises:
            RuntimeError: the command failed, or the process ended; the message ends with the last
                lines of its log.
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
        for line in self._process.stdout:  # skips lines that were printed before ``serve``
            if line.startswith(ANSWERS):
                return json.loads(line)
        return None

    def cpu_seconds(self):
        """Return the CPU time of the process in seconds, or None without /proc."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def pause(self):
        """Stop the process, on systems that can."""
        if STOPS:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        """Continue the stopped process."""
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
    """Answer the parent's commands until its pipe is closed.

    Args:
        commands: functions by name, which take keyword arguments and return JSON types.
    """
    _end_with_the_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints go to the log, not among the answers
    print(file=answers, flush=True)  # ends an unfinished line
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": commands[name](**arguments)}
        except Exception as error:  # the parent raises it; this process continues
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()  # the parent may read the log next
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_the_parent():
    """Have this process killed when its parent ends, because a stopped child would never end."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def memory_bytes():
    """Return this process's current and peak memory in bytes; None without /proc."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return {"now": None, "peak": None}
    sizes = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Vm"))
    now, peak = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}


def forget_the_peak():
    """Reset the peak memory to the current memory; return whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
