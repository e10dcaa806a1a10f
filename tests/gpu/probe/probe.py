#!/usr/bin/env python3
"""Ask one GPU the questions on which Everstep's CUDA path depends. See README.md.

Each test runs in a process of its own with a time limit; results are written after each. Nothing here changes clocks,
power, compute mode or persistence, resets a GPU, uses MPS or managed memory; the host can release every GPU wait.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE))

from driver import LIBRARY_VARIABLE, why_no_gpu
from options import REHEARSAL_VARIABLE, Options
from report import Report, rounded, write_json
from supervise import child_environment, run_in_process

FORMAT = 1
BUDGET_S = 405.0
_LEAST_USEFUL_S = 10.0


@dataclass(frozen=True)
class Test:
    """Where a test is and how long it may take."""

    module: str
    timeout_s: float
    function: str = "run"
    needs_gpu: bool = True
    title: str = ""


# In the order of running: most valuable first, the ones that break contexts last.
TESTS: dict[str, Test] = {
    "T0": Test("t0_environment", 30, needs_gpu=False),
    "T1": Test("t1_device_memory", 70),
    "T3": Test("t3_death", 90),
    "T4": Test("t4_fork", 90),
    "T8": Test("t8_stream_wait", 50),
    "T5": Test("t5_pinning", 80),
    "T6": Test("t6_determinism", 80),
    "T9": Test("t9_kernels", 60),
    "T7": Test("t7_faults", 60),
    "T7X": Test("t7_faults", 60, function="run_illegal_access", title="T7 again, with a write to unmapped memory"),
}
_INTERNAL = {
    "self-test": Test("selftest", 180, needs_gpu=False),
    "selftest-crash": Test("selftest", 20, function="crash", needs_gpu=False),
    "selftest-hang": Test("selftest", 20, function="hang", needs_gpu=False),
}


def main() -> int:
    """Returns 0 if every test that ran ended by itself, 1 otherwise."""
    arguments = _parse()
    options = Options(quick=arguments.quick, with_illegal_access=arguments.with_illegal_access)
    if arguments.subtest:
        return _run_subtest(arguments.subtest, arguments.report, options)
    if arguments.list:
        for name, test in TESTS.items():
            print(f"{name:4} {test.timeout_s:4.0f} s  {_title(test)}")
        return 0
    if arguments.rehearse:
        _prepare_rehearsal()
    names = ["self-test"] if arguments.self_test else _chosen(arguments)
    return _run_all(names, arguments, options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tests to run, as T1,T4 (default: all)")
    parser.add_argument("--skip", default="", help="tests to leave out, as T5,T9")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--json", type=Path, help="write the results here too, after each test")
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help="seconds for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--with-illegal-access", action="store_true", help="at the very end, T7X: a write to unmapped memory"
    )
    parser.add_argument("--self-test", action="store_true", help="check everything that needs no GPU")
    parser.add_argument(
        "--rehearse", action="store_true", help="run the tests' logic on the CPU with a stand-in driver"
    )
    parser.add_argument("--list", action="store_true", help="name the tests")
    parser.add_argument("--subtest", choices=[*TESTS, *_INTERNAL], help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """The tests to run, in our order. The illegal access needs its flag, whatever else is asked for."""
    asked = {name.strip().upper() for name in (arguments.only or ",".join(TESTS)).split(",") if name.strip()}
    left_out = {name.strip().upper() for name in arguments.skip.split(",") if name.strip()}
    unknown = (asked | left_out) - set(TESTS)
    if unknown:
        sys.exit(f"probe: no such test: {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    if arguments.with_illegal_access:
        asked.add("T7X")
    else:
        asked.discard("T7X")
    return [name for name in TESTS if name in asked - left_out]


def _run_all(names: list[str], arguments: argparse.Namespace, options: Options) -> int:
    began = time.monotonic()
    results: dict[str, Any] = {
        "format": FORMAT,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": sys.argv[1:],
        "rehearsal": options.rehearsal,
        "tests": {},
    }
    reason = why_no_gpu() if any(_test(name).needs_gpu for name in names) else None
    for name in names:
        left_s = arguments.budget_s - (time.monotonic() - began)
        results["tests"][name] = result = _run_one(name, left_s, reason, options)
        results["wall_s"] = rounded(time.monotonic() - began)
        if arguments.json:
            write_json(arguments.json, results)
        _tell(name, result)
    print(json.dumps(results, separators=(",", ":"), default=str), flush=True)
    failed = [
        n for n, r in results["tests"].items() if "skipped" not in r and (r["timed_out"] or r["exit"] != "exit 0")
    ]
    broken = arguments.self_test and any(r.get("failures") for r in results["tests"].values())
    return 1 if failed or broken else 0


def _run_one(name: str, left_s: float, no_gpu: str | None, options: Options) -> dict[str, Any]:
    test = _test(name)
    title = {"title": _title(test)}
    if test.needs_gpu and no_gpu:
        return title | {"skipped": f"no GPU: {no_gpu}"}
    if left_s < _LEAST_USEFUL_S:
        return title | {"skipped": f"the time budget is used up ({left_s:.0f} s left)"}
    print(f"probe: {name} {title['title']}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="everstep-probe-") as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(_HERE / "probe.py"), "--subtest", name, "--report", str(path)]
        command += ["--quick"] * options.quick
        command += ["--with-illegal-access"] * options.with_illegal_access
        result = run_in_process(
            command, timeout_s=min(test.timeout_s, left_s), report=path, environment=child_environment()
        )
    return title | result


def _tell(name: str, result: dict[str, Any]) -> None:
    """The answers of a test, on stderr as they come."""
    state = (
        result.get("skipped")
        or f"{result['exit']}{', stopped at its time limit' if result['timed_out'] else ''}, {result['wall_s']} s"
    )
    print(f"probe: {name}: {state}", file=sys.stderr)
    for sentence in result.get("findings", []):
        print(f"    {sentence}", file=sys.stderr)
    for failure in result.get("failures", []):
        print(f"    could not: {failure}", file=sys.stderr)
    if "skipped" not in result and (result["timed_out"] or result["exit"] != "exit 0"):
        print("    last words: " + result.get("output_tail", "").replace("\n", "\n    | "), file=sys.stderr)
    sys.stderr.flush()


def _run_subtest(name: str, path: Path, options: Options) -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    test = _test(name)
    report = Report(path)
    getattr(importlib.import_module(test.module), test.function)(report, options)
    return 0


def _test(name: str) -> Test:
    return TESTS.get(name) or _INTERNAL[name]


def _title(test: Test) -> str:
    """Its own title, or the first line of the module's docstring, read without importing it."""
    return test.title or (_HERE / f"{test.module}.py").read_text().split("\n", 1)[0].strip('"').split(". ", 1)[-1]


def _prepare_rehearsal() -> None:
    """Build the stand-in for libcuda and let all tests run on the CPU."""
    library = Path(tempfile.gettempdir()) / f"everstep-probe-fake-libcuda-{os.getuid()}.so"
    source = _HERE / "fake_libcuda.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-lpthread"], check=True)
    os.environ[REHEARSAL_VARIABLE] = "1"
    os.environ[LIBRARY_VARIABLE] = str(library)


if __name__ == "__main__":
    sys.exit(main())
