"""The `everstep` command, whose agents keep little of what no coordinator takes in."""

from __future__ import annotations

import sys

from everstep.cli import main
from everstep.comms.control import attach

if __name__ == "__main__":
    attach.OUTBOX_MESSAGES = 20
    sys.exit(main(sys.argv[1:]))
