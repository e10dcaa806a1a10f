"""A GPT job like `gpt_job`, in which one worker ends in an unusual way at step 3 of its first life.

Its `ends`: "thread": the main thread ends, and another thread still runs; "exit": the process ends with status 7.
"""

import json
import os
import sys
import threading
import time

import gpt_job
from threads import end_this_thread

from everstep.elastic.contract.settings import WorkerContext

config = json.loads(sys.argv[1])
context = WorkerContext.of(os.environ)


def end():
    if config["ends"] == "exit":
        os._exit(7)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    end_this_thread()


def dawdle():
    dawdle.times += 1
    if context.rank == 1 and context.incarnation == 0 and dawdle.times == 3:
        end()


dawdle.times = 0
gpt_job.dawdle = dawdle

if __name__ == "__main__":
    gpt_job.train()
