"""The `everstep` command on a system whose C library has no robust mutexes."""

from __future__ import annotations

from everstep import cli
from everstep.elastic.contract import robust_mutex

if __name__ == "__main__":
    robust_mutex._libc = object()
    cli.main()
