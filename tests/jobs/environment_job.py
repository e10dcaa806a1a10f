"""Writes what it finds in its environment and command line; prints a line on each stream."""

import json
import os
import sys
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
