"""T7. One worker's GPU fault: who else feels it, who hears of it?

Question  Out of memory: can the step be repeated, with the same bits? A device-side assertion in one of four workers:
          is the error sticky there, do the three others go on with the same bits, is memory of an owner without
          context intact, does a replacement on the same GPU work at once? Do NVML events and the kernel log tell, and
          how late? With --with-illegal-access: the same for a write to unmapped device memory, as the last act.
Method    Four forked workers repeat one micro-batch for ever and count steps; one of them is told to fail.
Meaning   Others unharmed: a fault is a process fault, a fork per attempt is the right model. NVML and log latency
          decide whether they can classify the fault before the replacement is placed.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from driver import MIB, Driver, Mapped
from nvml import KernelLog, XidEvents, open_nvml
from options import Options
from processes import Channel, Child, RoleFailed, ended_after, start
from report import Report, rounded
from t1_device_memory import digest, pattern

WORKERS = 4
_REGION_BYTES = 16 * MIB
_LISTEN_S = 3.0


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    _observe(report, options, ["out of memory", "device assertion"])


def run_illegal_access(report: Report, options: Options) -> None:
    """The out-of-bounds write, in a test of its own: nothing runs after it."""
    _observe(report, options, ["illegal access"])


def _observe(report: Report, options: Options, faults: list[str]) -> None:
    import torch

    del torch
    nvml = open_nvml()
    log = KernelLog()
    with ended_after() as children:
        owner = start("owner without context", _owner_role)
        children.append(owner)
        workers = [start(f"worker {i}", _worker_role(options)) for i in range(WORKERS)]
        children += workers
        for child in [owner, *workers]:
            child.hear(timeout_s=60)
        owner.channel.send({})
        fds = owner.hear_fds(timeout_s=10)[1]
        for worker in workers:
            worker.ask({"do": "attach"}, timeout_s=20, fds=fds)
        workers[0].ask({"do": "fill"}, timeout_s=20)
        events = XidEvents(nvml) if nvml else None
        report.measure("listeners", {"nvml": events and (events.error or "ok"), "kmsg": log.error or "ok"})
        right = workers[1].ask({"do": "digest"}, timeout_s=20)
        report.measure("recovery_action_before", nvml.recovery_action() if nvml else None)
        for fault in faults:
            with report.part(fault):
                if fault == "out of memory":
                    answer = workers[0].ask({"do": fault}, timeout_s=30)
                    same = answer["digest"] == right["step"]
                    report.find(
                        f"Out of memory is caught ({answer['error']}) and the step repeated with the same bits: {same}."
                    )
                else:
                    _one_faults(report, options, fault, workers, children, right, events, log, fds)
        for fd in fds:
            os.close(fd)
        report.measure("recovery_action_after", nvml.recovery_action() if nvml else None)
        if events:
            events.stop()
    log.stop()


def _one_faults(
    report: Report,
    options: Options,
    fault: str,
    workers: list[Child],
    children: list[Child],
    right: dict[str, str],
    events: XidEvents | None,
    log: KernelLog,
    fds: list[int],
) -> None:
    """Worker 0 fails; the others, the region and a replacement are examined."""
    victim, others = workers[0], workers[1:]
    before = [one.ask({"do": "steps"}, timeout_s=20)["steps"] for one in others]
    answer = victim.ask({"do": fault}, timeout_s=60)
    caught = answer["at"]
    report.measure(fault, {"error": answer["error"], "sticky": answer["sticky"], "error_seen_ms": answer["took_ms"]})
    report.find(f"{fault}: error in the process: {answer['error'][:120]}; sticky: {answer['sticky']}.")
    problems = _problems_of(others, before, right)
    report.find(
        f"{fault}: the other {len(others)} workers go on with the same bits, the region is intact: {problems or 'yes'}."
    )
    at = time.monotonic()
    victim.kill()
    report.measure(f"{fault}: victim's end", {"how": victim.describe_end(20), "s": rounded(time.monotonic() - at)})
    at = time.monotonic()
    replacement = start("replacement", _worker_role(options))
    children.append(replacement)
    workers[0] = replacement
    try:
        replacement.hear(timeout_s=60)
        replacement.ask({"do": "attach"}, timeout_s=20, fds=fds)
        same = replacement.ask({"do": "digest"}, timeout_s=20) == right
        verdict = f"{'yes' if same else 'NO, other bits'}, {time.monotonic() - at:.2f} s after its fork"
    except RoleFailed as error:
        verdict = f"NO ({error})"
    report.find(f"{fault}: a replacement on the same GPU computes the same bits: {verdict}.")
    time.sleep(max(0.0, _LISTEN_S - (time.monotonic() - caught)))
    heard = [(rounded(1000 * (t - caught)), xid) for t, xid in (events.seen if events else [])]
    logged = [(rounded(1000 * (t - caught)), xid, text) for t, xid, text in log.xids()]
    report.measure(f"{fault}: NVML events (ms after the error was caught, Xid)", heard)
    report.measure(f"{fault}: kernel log (ms after the error was caught, Xid, line)", logged)
    if not logged and log.lines:
        report.measure(f"{fault}: kernel log, other lines", [text for _, text in log.lines[-5:]])
    report.find(
        f"{fault}: NVML events {heard or 'none'}; Xids in the kernel log {[one[:2] for one in logged] or 'none'}."
    )


def _problems_of(others: list[Child], before: list[int], right: dict[str, str]) -> str:
    time.sleep(0.5)
    problems = []
    for one, steps in zip(others, before, strict=True):
        try:
            if one.ask({"do": "steps"}, timeout_s=20)["steps"] <= steps:
                problems.append(f"{one.name} stands still")
            if one.ask({"do": "digest"}, timeout_s=20) != right:
                problems.append(f"{one.name}: other bits")
        except RoleFailed as error:
            problems.append(str(error)[:200])
    return "; ".join(problems)


def _owner_role(channel: Channel) -> None:
    driver = Driver()
    driver.initialise()
    handle = driver.create(_REGION_BYTES)
    channel.send({"ready": True})
    while True:
        channel.receive(600)
        fd = driver.export_fd(handle)
        channel.send({}, [fd])
        os.close(fd)


def _worker_role(options: Options) -> Any:
    def role(channel: Channel) -> None:
        import torch
        from gpu import device
        from small_gpt import TINY, Shape, build, gradients, leaf_digest, micro_batch

        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cuda.enable_cudnn_sdp(False)
        shape = TINY if options.rehearsal else Shape(layers=2)
        model = build(shape).to(device())
        ids = micro_batch(shape, 0, device())
        driver = Driver()
        if options.rehearsal:
            driver.initialise()
        region: Mapped | None = None
        host = (ctypes.c_ubyte * _REGION_BYTES)()

        def step() -> str:
            return leaf_digest(model, gradients(model, ids, autocast=True))

        steps = 0
        last = step()
        channel.send({"ready": True})
        while True:
            if not channel.waiting():
                last, steps = step(), steps + 1
                continue
            message, fds = channel.receive(1)
            command = message["do"]
            if command == "attach":
                region = Mapped(driver, driver.import_fd(fds[0]), _REGION_BYTES)
                os.close(fds[0])
                channel.send({})
            elif command == "fill":
                assert region is not None
                driver("cuMemcpyHtoD_v2", region.pointer, pattern(_REGION_BYTES), _REGION_BYTES)
                channel.send({})
            elif command == "digest":
                assert region is not None
                driver("cuMemcpyDtoH_v2", host, region.pointer, _REGION_BYTES)
                channel.send({"step": step(), "region": digest(memoryview(host))})
            elif command == "steps":
                channel.send({"steps": steps, "last": last})
            elif command == "out of memory":
                channel.send({"error": _run_out_of_memory(), "digest": step()})
            else:
                channel.send(_fail(command, driver))
                channel.receive(600)  # stay as we are, with a broken context, until killed

    return role


def _run_out_of_memory() -> str:
    import torch
    from gpu import device, free_bytes, no_memory_error

    if device().type == "cpu":
        return "rehearsed"
    try:
        torch.empty(free_bytes() + (64 << 30), dtype=torch.uint8, device=device())
    except no_memory_error() as error:
        return type(error).__name__
    return "not raised"


def _fail(fault: str, driver: Driver) -> dict[str, Any]:
    """Provoke the fault; say what the process saw, when, and whether the next harmless call fails too."""
    import torch
    from gpu import device, synchronise

    began = time.monotonic()
    error = "nothing was raised"
    try:
        if device().type == "cpu":
            raise RuntimeError("rehearsed")
        if fault == "device assertion":
            torch._assert_async(torch.zeros((), device=device()))
        else:
            _write_to_unmapped_memory(driver)
        synchronise()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    at = time.monotonic()
    try:
        float(torch.ones(4, device=device()).sum())
        sticky = False
    except Exception:
        sticky = True
    return {"error": error, "sticky": sticky, "at": at, "took_ms": rounded(1000 * (at - began))}


def _write_to_unmapped_memory(driver: Driver) -> None:
    """Write through a mapping that has been taken away, as a worker would whose region was dropped too early."""
    from gpu import bytes_at

    size = driver.granularity()
    mapped = Mapped(driver, driver.create(size), size)
    view = bytes_at(mapped.pointer, size)
    view.fill_(1)
    driver("cuCtxSynchronize")
    driver.unmap(mapped.pointer, size)
    view.fill_(2)
