"""A real Slurm on this machine, for tests: munged, slurmctld, and a slurmd for each of several nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from everstep.comms.base.process import die_with_parent
from tests.jobs import wait_until

from .ports import free_ports

TOOLS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge", "sbatch": "slurm-client"}
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmdTimeout=5
KillWait=5
ReturnToService=2
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """`count` nodes, n0, n1, ..., all on this machine. Leaves nothing behind."""

    def __init__(self, folder: Path, count: int) -> None:
        for tool, package in TOOLS.items():
            if shutil.which(tool, path=_PATH) is None:
                pytest.skip(f"{tool} is not installed (Debian: {package})")
        if os.geteuid() != 0:
            pytest.skip("only root may start Slurm's daemons")
        self.folder, self.names = folder, [f"n{number}" for number in range(count)]
        self.environment = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        folder, host = self.folder, socket.gethostname()
        (folder / "state").mkdir()
        ours, *ports = free_ports(1 + len(self.names))
        named = zip(self.names, ports, strict=True)
        lines = [f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1" for n, port in named]
        conf = _CONF.format(host=host, port=ours, folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(conf)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = ("socket", "pid-file", "log-file", "seed-file")
        own = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in names]
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *own)
            wait_until((folder / "munge.socket").exists, 10, "munged listens")
            self._start("slurmctld", "-D")
            for name in self.names:
                self._start("slurmd", "-D", "-N", name, known_as=name)
            wait_until(lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle", 30, "all nodes are idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, *command: str, known_as: str = "") -> None:
        log = (self.folder / f"{known_as or command[0]}.out").open("wb")
        with log:
            self._daemons[known_as or command[0]] = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands; returns its output."""
        env = {**os.environ, **self.environment, **(environment or {})}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True).stdout

    def steps_on(self, name: str) -> list[psutil.Process]:
        """What runs on a node but its daemon: the step's own process, and below it the user's."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if mine and process.environ().get("SLURMD_NODENAME") == name:
                    found.append(process)
                    found += [p for p in process.parents() if p.name() == "slurmstepd" and p not in found]
        return found

    def lose(self, name: str) -> None:
        """A node is gone: its daemon, and everything that runs there, at once."""
        daemon = self._daemons.pop(name)
        victims = self.steps_on(name)
        daemon.kill()
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(victims, timeout=10)
        daemon.wait()

    def close(self) -> None:
        """End all of its remaining processes."""
        for name in [name for name in self.names if name in self._daemons]:
            self.lose(name)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
