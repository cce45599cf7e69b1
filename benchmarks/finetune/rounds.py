"""Run every workload on every contender once per round, in a new random order.

The processes load once. While a process runs, the others are stopped. Their caches on disk are
those of the first fresh process that trained, where there was such a process.

Source: ``benchmarks/results/README.md``.
"""

from pathlib import Path

from benchmarks.child import Child
from benchmarks.finetune.contender import CONTENDERS
from benchmarks.finetune.starts import MODULE, caches_of, checkpoint_of, environment_of
from benchmarks.finetune.workloads import TRAINING
from benchmarks.turns import Turns, shuffled


class Rounds(Turns):
    """The contenders' processes.

    Args:
        workloads: steps or ``generate``.
        folder: for logs and caches.
        threads: the threads of a process.
        say: called with each line of progress.
    """

    def __init__(self, workloads, folder, threads, say):
        super().__init__()
        self._workloads = workloads
        self._folder, self._threads, self._say = Path(folder), threads, say

    def load(self, files):
        """Start the processes, and load the models and adapters.

        Returns:
            The number of threads of each process.
        """
        threads = {}
        for name in CONTENDERS:
            caches = caches_of(self._folder, 0, name, TRAINING)
            environment = environment_of(caches, self._threads)
            log = self._folder / f"{self._workloads[0]}-{name}.log"
            self.children[name] = Child(MODULE, log, environment)
            threads[name] = self.ask(name, "imports", name=name)["threads"]
            self.ask(name, "load", folder=checkpoint_of(name, files))
            self.ask(name, "adapt")
            self._say(f"{name}: loaded")
        return threads

    def run(self, sizes, rounds, seed):
        """Run every workload once unmeasured, then once in each round.

        Args:
            sizes: the sizes of a batch.
            rounds: the number of rounds.
            seed: of the random order.

        Returns:
            A list of dicts, one for each contender and workload.
        """
        runs = {
            (name, workload): {"contender": name, "workload": workload, "rounds": []}
            for name in self.children
            for workload in self._workloads
        }
        for number, order in shuffled(runs, rounds, seed):
            for name, workload in order:
                command, arguments = sizes.of_speed(workload)
                answer = self.ask(name, command, **arguments)
                if number:
                    runs[name, workload]["rounds"].append(answer)
                else:
                    runs[name, workload]["cold"] = answer
            self._say(f"{self._workloads[0]}: round {number} of {rounds} done")
        return list(runs.values())

    def idle_shares(self):
        """Return the share of a processor that each contender used while others ran."""
        return {name: self.idle_share(name) for name in self.children}
