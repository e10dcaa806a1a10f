"""Run a command and print its wall time and the largest memory of any of its processes, as JSON.

This is a separate, small process: the kernel counts the memory of a process before it executes the command too.
"""

import json
import resource
import subprocess
import sys
import time

started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
seconds = time.perf_counter() - started
if done.returncode:
    sys.exit(done.stdout.decode()[-2000:])
print(json.dumps({"seconds": seconds, "rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))
