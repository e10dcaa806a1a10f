"""The `everstep` command with agents that queue few messages while no coordinator can be reached."""

from __future__ import annotations

import sys

from everstep.cli import main
from everstep.comms.control import attach

if __name__ == "__main__":
    attach.OUTBOX_MESSAGES = 20
    sys.exit(main(sys.argv[1:]))
