"""The worker processes of a grid: started each with a GPU of its own where it uses one, watched, signalled and waited for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from basd.grid import leases
from basd.grid.options import GridOptions


class Workers:
    """The worker processes of this grid."""

    def __init__(self, plan_path: Path, options: GridOptions, logs: Path) -> None:
        self.options, self.logs, self._plan = options, logs, plan_path
        self.limit = options.workers(len(options.devices()) if options.processes != 1 else 0)
        self.started = self.deaths = 0
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by process id
        self.last_death = ""

    def __len__(self) -> int:
        return len(self._running)

    def start(self) -> None:
        """Start one more worker, on a free GPU where it uses one; its output goes to a log named after it.

        `LeasedError` where other workers have every GPU.
        """
        from basd.data.feed import TRAINERS
        from basd.grid.worker import OPTIONS

        # taken here and handed over: which device a worker gets, and whether there is one, is known before it starts
        lease = leases.take(self.options)
        self.logs.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self.options.threads)
        # what the cores are shared by
        environment[TRAINERS] = str(self.limit)
        if lease is not None and not leases.names_device(self.options):
            environment["CUDA_VISIBLE_DEVICES"] = lease.device.entry
        command = [sys.executable, "-m", "basd.grid.worker", "--plan", str(self._plan)]
        # addresses may hold passwords, and every user of the machine sees command lines
        environment[OPTIONS] = json.dumps(self.options.to_dict())
        command += ["--workers", str(self.limit), "--parent", str(os.getpid()), "--log-directory", str(self.logs)]
        command += ["--leased"] if lease is not None else []
        nameless = self.logs / f"worker-{uuid.uuid4().hex}.log"
        try:
            with open(nameless, "ab") as log:
                # a session of its own: Ctrl-C at the terminal reaches this process alone, which then asks the workers
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                    pass_fds=[lease.lock.fileno()] if lease is not None else [],
                )
            if lease is not None:
                lease.sign(process.pid)
        finally:
            if lease is not None:
                lease.release()
        os.replace(nameless, self._log_of(process))
        self._running[process.pid] = process
        self.started += 1

    def gone(self) -> list[str]:
        """Forget workers that have ended; returns one sentence for each that did not end well."""
        sentences = []
        for pid, process in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[pid]
            if status:
                self.deaths += 1
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                self.last_death = f"a worker {how}{self._last_line(process)}; its log: {self._log_of(process)}"
                sentences.append(self.last_death)
        return sentences

    def signal(self, number: int) -> None:
        """Send a signal to every worker."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout: float) -> bool:
        """Wait for all workers to end; returns whether they did."""
        limit = time.monotonic() + timeout
        while any(process.poll() is None for process in self._running.values()):
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        self.gone()
        return True

    def _log_of(self, process: subprocess.Popen[bytes]) -> Path:
        return self.logs / f"worker-{socket.gethostname()}-{process.pid}.log"

    def _last_line(self, process: subprocess.Popen[bytes]) -> str:
        try:
            lines = self._log_of(process).read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f" ({lines[-1][:200]})" if lines else ""
