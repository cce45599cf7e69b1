"""Run cases in a process of their own, so that a backend that crashes or hangs fails one case.

The process is given the cases by name and sends each outcome when it is known. If it ends early, or
sends nothing for as long as the limit, the current case has failed, and a new process goes on with
the next one.

Source: ``docs/conformance.md``, "The verdict".
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from int4_lora.integration.conformance.loading import load_backend
from int4_lora.reference.conformance import Case, Manifest, Outcome, run, select
from int4_lora.reference.conformance.reproduce import snippet

__all__ = ["IsolatedRun"]


LOADING = 300.0  # seconds: torch alone takes many on a busy machine


class IsolatedRun:
    """A backend in a process of its own, ready to run cases.

    Args:
        spec: the backend, as ``load_backend`` takes it.
        cases: what ``select`` returned.
        seed: of the inputs.
        device: the device of the operands.
        limit: the seconds that each case may take; to load the backend may take 300, or the limit
            if it is longer.
        evidence: whether outcomes keep their evidence.

    Raises:
        ValueError: the backend cannot be loaded.
    """

    def __init__(
        self,
        spec: str,
        cases: Sequence[Case],
        *,
        seed: int,
        device: str,
        limit: float,
        evidence: bool = False,
    ) -> None:
        self.spec, self.cases, self.seed, self.device = spec, list(cases), seed, device
        self.limit, self.evidence = limit, evidence
        self._worker = _Worker(self._job(0))
        self.manifest = self._loaded()

    def outcomes(self) -> Iterator[Outcome]:
        """Run the cases; yield the outcome of each, not yet settled."""
        done = 0
        try:
            while done < len(self.cases):
                outcome = self._worker.receive(self.limit)
                if isinstance(outcome, Outcome) and outcome.case == self.cases[done].name:
                    yield outcome
                    done += 1
                    continue
                if outcome != SPOILED:
                    yield self._ended(self.cases[done])
                    done += 1
                self._worker.end()
                if done < len(self.cases):
                    self._worker = _Worker(self._job(done))
                    self._loaded()
        finally:
            self._worker.end()

    def _loaded(self) -> Manifest:
        limit = max(self.limit, LOADING)
        received = self._worker.receive(limit)
        if isinstance(received, Manifest):
            return received
        self._worker.end()
        if isinstance(received, str):
            raise ValueError(received)
        rule, why = self._worker.why_ended(limit)
        raise ValueError(f"backend {self.spec!r}: {rule} while it was loaded: {why}")

    def _ended(self, case: Case) -> Outcome:
        rule, why = self._worker.why_ended(self.limit)
        text = snippet(self.spec, case, (self.seed, self.device), ([], 0, 0), 0)
        return Outcome(case.name, case.exercises, "failed", rule, why, snippet=text)

    def _job(self, first: int) -> dict[str, Any]:
        names = [case.name for case in self.cases[first:]]
        return {
            "path": sys.path,
            "spec": self.spec,
            "cases": names,
            "seed": self.seed,
            "device": self.device,
            "evidence": self.evidence,
        }


SPOILED = "spoiled"
"""Sent where a device no longer computes, as after an illegal access on CUDA."""


class _Worker:
    """A process that runs cases, and the pipe that its messages come through."""

    def __init__(self, job: dict[str, Any]) -> None:
        reading, writing = os.pipe()
        self._received = Connection(reading, writable=False)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=(writing,),
            start_new_session=True,  # so that processes that a backend starts end with it
        )
        os.close(writing)
        self._hangs = False
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stream:
                stream.write(json.dumps(job).encode())

    def receive(self, limit: float) -> object:
        """Return the next message, or None if the process ends or takes too long."""
        try:
            if self._received.poll(limit):
                return pickle.loads(self._received.recv_bytes())
        except (EOFError, OSError):
            return None
        self._hangs = True
        return None

    def end(self) -> None:
        """End the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._received.close()

    def why_ended(self, limit: float) -> tuple[str, str]:
        """Return the rule and the message for a process that sent nothing more."""
        if self._hangs and self._process.poll() is None:
            return "hang", f"no result within {limit:g} s; the process was killed"
        code = self._process.wait()
        if code < 0:
            return "crash", f"the process was ended by {signal.Signals(-code).name}"
        return "crash", f"the process exited with code {code}"


def _work(sent: Connection, job: dict[str, Any]) -> None:
    """Load the backend, run the cases, send the manifest and each outcome."""
    process = os.getpid()

    def send(message: object) -> None:
        if os.getpid() != process:  # a backend has forked, and the copy has come back, too
            os._exit(0)
        sent.send_bytes(pickle.dumps(message))

    try:
        backend = load_backend(job["spec"])
    except (ImportError, OSError, TypeError, ValueError) as error:
        send(str(error))
        return
    send(backend.manifest)
    seed, device = job["seed"], job["device"]
    running = run(backend, _cases(job["cases"]), seed=seed, device=device, evidence=job["evidence"])
    for outcome in running:
        send(outcome)
        if outcome.rule == "call" and not _computes(device):
            send(SPOILED)
            return


def _cases(names: Sequence[str]) -> list[Case]:
    cases = {case.name: case for case in select(",".join(names))}
    return [cases[name] for name in names]


def _computes(device: str) -> bool:
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except RuntimeError:
        return False


def _main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    sys.path[:] = job["path"]
    os.dup2(2, 1)  # stdout is for the report, not for backends
    _work(Connection(int(sys.argv[1]), readable=False), job)


if __name__ == "__main__":
    _main()
