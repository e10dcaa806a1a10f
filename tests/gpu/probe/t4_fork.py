"""T4. Which acts poison a fork, and how soon does a fresh fork or a warm standby do its first step?

Question  A preloaded process imports torch and perhaps runs a CPU optimizer step, then forks workers. Which acts
          reach cuInit in it and so forbid CUDA in all its forks? In particular `AdamW.step()`, which asks for the
          current accelerator with check_available=True; and does PYTORCH_NVML_BASED_CUDA_CHECK=1 cure it? Then: time
          of cuInit, context, first GEMM, first and second training step in a cold fork; the same from a warm standby;
          device memory per context.
Method    Each act in a process of its own: libcuda mapped (/proc/self/maps)? /dev/nvidia* open? does libcuda itself
          answer NOT_INITIALIZED? then a fork that makes a CUDA tensor. Timings: three forks one after the other of a
          clean preloaded process. Standby: a fork that has done a step waits on a socket, is woken, does a step.
Meaning   The poisonous acts go on the preloader's guard list (or the variable is set for it). Cold fork below 1 s: no
          standby needed by default; standby below 0.5 s confirms the design; memory per context is its price.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from driver import Driver, NoDriver, library_names
from nvml import Nvml, open_nvml
from options import Options
from processes import Channel, ended_after, start
from report import Json, Report, read_json, rounded, spread

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
ACTS = (
    "import torch",
    "backward()",
    "AdamW.step()",
    "AdamW(foreach=True).step()",
    "AdamW(fused=True).step()",
    "SGD.step()",
    "current_accelerator()",
    "current_accelerator(check_available=True)",
    "cuda.device_count()",
    "cuda.is_available()",
    "manual_seed()",
    "DataLoader(pin_memory=True)",
    "import triton",
    "autocast(cpu)",
)
_IDLE_S = 4.0


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    with report.part("poison"):
        _poison(report, options)
    os.environ[NVML_CHECK] = "1"
    # If even so the step forbids CUDA in forks, the timings below do without it.
    acts = report.measured.get("acts", {})
    harmless = acts.get("AdamW.step() with NVML check", {}).get("fork_can_use_cuda", False)
    with report.part("cold forks"):
        _cold_forks(report, options, harmless)
    with report.part("standby"):
        _standby(report, options, harmless)


# Which acts poison a fork


def _poison(report: Report, options: Options) -> None:
    acts = ACTS if not options.rehearsal else ACTS[:7]
    cases = [(act, check) for act in acts for check in ("0", "1")]
    table: dict[str, Any] = {}
    waiting = list(cases)
    running: list[tuple[str, str, Path, subprocess.Popen[bytes]]] = []
    width = 8 if (os.cpu_count() or 1) >= 8 else 2
    while waiting or running:
        while waiting and len(running) < width:
            act, check = waiting.pop(0)
            path = Path(f"/tmp/probe-act-{os.getpid()}-{len(waiting)}.json")
            environment = dict(os.environ)
            environment.pop(NVML_CHECK, None)
            if check == "1":
                environment[NVML_CHECK] = "1"
            command = [sys.executable, __file__, act, str(path)]
            running.append((act, check, path, subprocess.Popen(command, env=environment)))
        for entry in list(running):
            act, check, path, process = entry
            if process.poll() is not None:
                running.remove(entry)
                table[f"{act}{' with NVML check' if check == '1' else ''}"] = read_json(path) or {
                    "failed": f"exit {process.returncode}"
                }
                path.unlink(missing_ok=True)
        time.sleep(0.02)
    report.measure("acts", table)
    poisonous = [act for act, seen in table.items() if seen.get("fork_can_use_cuda") is False]
    report.find(f"Acts after which a fork cannot use CUDA: {', '.join(poisonous) or 'none'}.")
    plain, cured = table.get("AdamW.step()", {}), table.get("AdamW.step() with NVML check", {})
    report.find(
        f"AdamW.step() on the CPU poisons forks: {_yes_no(plain)}; with {NVML_CHECK}=1: {_yes_no(cured)} "
        f"(cuInit reached: {plain.get('initialised')} / {cured.get('initialised')})."
    )
    missed = [
        act
        for act, seen in table.items()
        if seen.get("initialised") and not seen.get("uvm_open") and seen.get("libcuda_mapped") is not None
    ]
    report.find(
        f"cuInit without an open /dev/nvidia-uvm (the guard by descriptors would miss it): {missed or 'never'}."
    )


def _yes_no(seen: Json) -> str:
    answer = seen.get("fork_can_use_cuda")
    return "unknown" if answer is None else ("no" if answer else "YES")


def perform_act(act: str) -> None:
    """Do one thing that a preloaded process might do. None of them is meant to touch CUDA."""
    import torch

    if "step()" in act:
        model = torch.nn.Linear(8, 8)
        if act.startswith("SGD"):
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        else:
            optimizer = torch.optim.AdamW(
                model.parameters(), foreach="foreach" in act or None, fused="fused" in act or None
            )
        for parameter in model.parameters():  # not by a backward pass, which is an act of its own
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    elif act == "backward()":
        torch.nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
    elif act == "current_accelerator()":
        torch.accelerator.current_accelerator()
    elif act == "current_accelerator(check_available=True)":
        torch.accelerator.current_accelerator(check_available=True)
    elif act == "cuda.device_count()":
        torch.cuda.device_count()
    elif act == "cuda.is_available()":
        torch.cuda.is_available()
    elif act == "manual_seed()":
        torch.manual_seed(1)
    elif act == "DataLoader(pin_memory=True)":
        list(torch.utils.data.DataLoader([torch.zeros(1)] * 2, pin_memory=True))
    elif act == "import triton":
        import triton  # noqa: F401
    elif act == "autocast(cpu)":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.Linear(8, 8)(torch.ones(1, 8))


def traces_of_cuda() -> Json:
    """What this process shows of CUDA: library mapped, devices open, and libcuda's own word on cuInit."""
    maps = Path("/proc/self/maps").read_text()
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    devices = sorted({target for target in targets if target.startswith("/dev/nvidia")})
    try:
        initialised: bool | None = Driver(loaded_only=True).was_initialised()
    except NoDriver:
        initialised = False
    return {
        "libcuda_mapped": any(name in maps for name in ("libcuda.so", *library_names())),
        "libcudart_mapped": "libcudart" in maps,
        "devices_open": devices,
        "uvm_open": any("uvm" in device for device in devices),
        "initialised": initialised,
    }


def _act_main(act: str, path: Path) -> None:
    from report import write_json

    perform_act(act)
    import torch

    seen = traces_of_cuda() | {"torch_initialised": torch.cuda.is_initialized()}
    with ended_after() as children:
        child = start("fork", _uses_cuda)
        children.append(child)
        try:
            child.hear(timeout_s=12)
            seen["fork_can_use_cuda"] = True
        except Exception as error:
            seen["fork_can_use_cuda"] = False
            seen["fork_error"] = str(error)[:200]
    write_json(path, seen)


def _uses_cuda(channel: Channel) -> None:
    import torch
    from gpu import device

    ones = torch.ones(4, device=device(), requires_grad=True)
    ones.sum().backward()  # torch refuses it in a fork of a process that has threads for it
    channel.send({"sum": float(ones.grad.sum())})


# How soon a fork works


def _preload(options: Options, *, with_step: bool) -> Any:
    """What a preloaded process holds: torch imported, the model built, an optimizer step done on the CPU if asked.

    On one thread: a fork of a process that has a pool of OpenMP threads hangs in its own first parallel operation.
    """
    import torch
    from small_gpt import TINY, Shape, build

    torch.set_num_threads(1)

    if with_step:
        tiny = build(TINY)
        for parameter in tiny.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(tiny.parameters()).step()
    shape = TINY if options.rehearsal else Shape()
    return shape, build(shape)


def _worker(shape: Any, model: Any, forked_at: list[float]) -> Any:
    """A forked worker: times each stage of its first step, then waits to be woken for further ones."""

    def role(channel: Channel) -> None:
        stages: Json = {"fork_s": time.monotonic() - forked_at[0]}

        def stage(name: str, work: Any) -> Any:
            began = time.monotonic()
            value = work()
            stages[name] = rounded(time.monotonic() - began)
            return value

        driver = Driver()
        stage("cuInit_s", driver.initialise)
        stage("context_s", driver.enter)
        channel.send({"reached": "context"})  # the conductor looks at the device's memory now
        channel.receive(60)

        import torch
        from gpu import device, synchronise
        from small_gpt import gradients, micro_batch

        def first_tensor() -> Any:
            tensor = torch.ones(1024, 1024, device=device())
            synchronise()
            return tensor

        ones = stage("torch_first_tensor_s", first_tensor)

        def product(dtype: Any) -> None:
            torch.mm(ones.to(dtype), ones.to(dtype))
            synchronise()

        stage("first_gemm_fp32_s", lambda: product(torch.float32))
        stage("first_gemm_bf16_s", lambda: product(torch.bfloat16))
        stage("model_to_device_s", lambda: (model.to(device()), synchronise()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            loss = gradients(model, micro_batch(shape, 0, device()), autocast=True)
            optimizer.step()
            float(loss)
            synchronise()

        stage("first_step_s", step)
        stage("second_step_s", step)
        stages["total_to_first_step_s"] = rounded(
            sum(v for k, v in stages.items() if k.endswith("_s") and "second" not in k)
        )
        channel.send(stages)
        while True:
            message = channel.receive(600)[0]
            if message["do"] == "quit":
                return
            woken = time.monotonic()
            step()
            done = time.monotonic()
            channel.send({"wake_ms": 1000 * (woken - message["at"]), "to_first_step_ms": 1000 * (done - message["at"])})

    return role


def _cold_forks(report: Report, options: Options, with_step: bool) -> None:
    shape, model = _preload(options, with_step=with_step)
    traces = traces_of_cuda()
    report.measure("preloaded_process", traces)
    report.find(
        f"A preloaded process {'after' if with_step else 'without'} a CPU AdamW step, with {NVML_CHECK}=1, "
        f"is free of cuInit: {not traces['initialised']}."
    )
    nvml = open_nvml()
    series = []
    for _ in range(options.pick(full=3, quick=2, rehearsal=1)):
        before = _used_mib(nvml)
        with ended_after() as children:
            child = start("cold fork", _worker(shape, model, [time.monotonic()]))
            children.append(child)
            child.hear(timeout_s=40)
            with_context = _used_mib(nvml)
            stages = child.ask({"do": "go on"}, timeout_s=40)
            stages["added_mib_context"] = with_context - before
            stages["added_mib_after_steps"] = _used_mib(nvml) - before
        series.append(stages)
        report.measure("cold_forks", series)
        time.sleep(1.0)
    last = series[-1]
    report.find(
        f"Cold fork to the end of its first step: {[s['total_to_first_step_s'] for s in series]} s "
        f"(last: cuInit {last['cuInit_s']}, context {last['context_s']}, first GEMM {last['first_gemm_fp32_s']}, "
        f"first step {last['first_step_s']}, second {last['second_step_s']}); device memory of a context "
        f"{last['added_mib_context']} MiB, after steps {last['added_mib_after_steps']} MiB."
    )


def _used_mib(nvml: Nvml | None) -> int:
    """Device memory in use by everyone; 0 where it cannot be read."""
    return nvml.used_bytes() >> 20 if nvml else 0


def _standby(report: Report, options: Options, with_step: bool) -> None:
    shape, model = _preload(options, with_step=with_step)
    with ended_after() as children:
        child = start("standby", _worker(shape, model, [time.monotonic()]))
        children.append(child)
        child.hear(timeout_s=40)
        child.ask({"do": "go on"}, timeout_s=40)
        cold = []
        for _ in range(options.pick(full=3, quick=1, rehearsal=1)):
            time.sleep(options.pick(full=_IDLE_S, quick=1.0, rehearsal=0.1))  # clocks fall while it idles
            cold.append(child.ask({"do": "step", "at": time.monotonic()}, timeout_s=20))
        warm = [child.ask({"do": "step", "at": time.monotonic()}, timeout_s=20) for _ in range(10)]
    report.measure("standby_after_idle_ms", [rounded(one["to_first_step_ms"]) for one in cold])
    report.measure("standby_wake_ms", [rounded(one["wake_ms"]) for one in cold])
    report.measure("standby_busy_ms", spread([one["to_first_step_ms"] for one in warm], "ms"))
    report.find(
        f"Warm standby, parked and woken: step done after {[rounded(one['to_first_step_ms']) for one in cold]} ms."
    )


if __name__ == "__main__":
    _act_main(sys.argv[1], Path(sys.argv[2]))
