"""Torch's compiler is imported on first use, and then behaves as usual."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAIN = """
import sys, torch
from everstep.agents.node.compiler import defer_compiler
defer_compiler()
stand_in = torch._dynamo

def real():
    return sys.modules["torch._dynamo"] is not stand_in

model = torch.nn.Linear(2, 2)
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model(torch.ones(1, 2)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(), scheduler.step(), optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not real(), kind
assert "torch._dynamo.eval_frame" not in sys.modules
"""
COMPILE = """
executed = [name for name in seen if name.startswith("torch._dynamo")]
assert executed.count("torch._dynamo") == 1 and len(executed) == len(set(executed)), executed
assert real() and torch._dynamo is sys.modules["torch._dynamo"] and stand_in.config is torch._dynamo.config
assert all(m.__spec__.name == n and m.__spec__.loader.path == m.__file__ for n, m in sys.modules.items()
    if n.startswith("torch._dynamo"))

graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

@torch.compile(backend=backend)
def compiled(x):
    y = x.sin()
    optimizer.zero_grad()  # torch's own decorator keeps it out of the graph
    z = y + 1
    torch._dynamo.graph_break()
    return z * 2

assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))
assert len(graphs) == 3, graphs
"""
SPY = """
import importlib.machinery
seen = []
execute = importlib.machinery.SourceFileLoader.exec_module
def spy(self, module):
    seen.append(module.__name__)
    execute(self, module)
importlib.machinery.SourceFileLoader.exec_module = spy
"""
NEEDS = [
    "torch.compile(lambda x: x, backend='eager')(torch.ones(1))",
    "import torch._dynamo.utils; torch._dynamo.utils.counters",
    # Not loaded by the import of the whole.
    "import torch._dynamo.testing as testing; assert torch._dynamo.testing is testing",
    "from torch._dynamo import config; torch._dynamo.mine = 1",
    "assert torch._dynamo.disable(real)()",
    "from threading import Thread; use = lambda: torch._dynamo.utils.get_optimize_ddp_mode()\n"
    "threads = [Thread(target=use) for _ in range(4)]; [t.start() for t in threads]; [t.join() for t in threads]",
]
# The first use, each in a fork of a process that has trained.
EACH = """
import os, traceback
for need in sys.argv[1:]:
    if os.fork() == 0:
        status = 1
        try:
            exec(need)
            exec(compiled_right)
            status = 0
        except BaseException:
            print(need, traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
sys.exit(any([os.wait()[1] for _ in sys.argv[1:]]))
"""


@pytest.mark.soak
def test_the_compiler_comes_when_it_is_needed() -> None:
    script = f"{SPY}{TRAIN}\ncompiled_right = {COMPILE!r}\n{EACH}"
    done = subprocess.run([sys.executable, "-c", script, *NEEDS], timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_is_there_stays() -> None:
    script = (
        "import sys, torch; sys.modules['torch._dynamo'] = there = object();"
        "from everstep.agents.node.compiler import defer_compiler; defer_compiler();"
        "assert sys.modules['torch._dynamo'] is there"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
