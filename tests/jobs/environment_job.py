"""Writes its environment and command line; prints a line on each stream.

With the argument "wait" it then waits for a signal, and writes which; rank 1 ignores them.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

out = Path(os.environ["OUT"])
rank = os.environ["RANK"]
found = {
    "environment": dict(os.environ),
    "arguments": sys.argv[1:],
    "name": __name__,
    "path": sys.path[0],
    "file": os.path.basename(__file__),
}
(out / f"{rank}.json").write_text(json.dumps(found))
print(f"output of rank {rank}")
print(f"error of rank {rank}", file=sys.stderr)


def stopped(number, frame):
    (out / f"{rank}.signal").write_text(signal.Signals(number).name)
    if rank != "1":
        sys.exit(0)


if sys.argv[1:2] == ["wait"]:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stopped)
    (out / f"{rank}.waits").touch()
    while True:
        time.sleep(0.1)
