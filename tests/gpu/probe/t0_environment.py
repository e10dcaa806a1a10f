"""T0. What machine is this?

Question  Which GPU, driver, versions and limits do the other answers hold for, and which calls does cuda.bindings
          offer?
Method    NVML and driver attributes, package versions, kernel settings; names looked up in cuda.bindings.driver; one
          VMM block made and exported through cuda.bindings, as the product would.
Meaning   The head of the record. If cuda.bindings can export a block, the product needs no ctypes of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
from driver import ATTRIBUTES, MIB, Driver
from nvml import open_nvml
from options import Options
from processes import Channel, ended_after, start
from report import Report

_PACKAGES = (
    "torch",
    "triton",
    "cuda-bindings",
    "cuda-core",
    "nvidia-ml-py",
    "nvidia-nccl-cu13",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "numpy",
    "xxhash",
    "psutil",
)
_CALLS = (
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemRelease",
    "cuMemHostRegister",
    "cuMemHostGetDevicePointer",
    "cuStreamWaitValue64",
    "cuStreamWriteValue64",
    "cuMemcpyDtoDAsync",
    "cuMemcpyDtoHAsync",
)
_KERNEL_FILES = (
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/vm/nr_hugepages",
    "/proc/sys/kernel/yama/ptrace_scope",
    "/proc/driver/nvidia/version",
)


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    report.measure("host", _host())
    report.measure("packages", {name: _version(name) for name in _PACKAGES})
    nvml = open_nvml()
    with report.part("nvml"):
        report.measure("nvml", nvml.identity() if nvml else "none")
    for name, role in (("driver", _driver_role), ("cuda_bindings", _bindings_role)):
        with report.part(name), ended_after() as children:
            child = start(name, role)
            children.append(child)
            report.measure(name, child.hear(timeout_s=20))
    bindings = report.measured.get("cuda_bindings", {})
    if bindings:
        missing = ", ".join(bindings["missing"]) or "none"
        report.find(f"cuda.bindings: calls missing: {missing}; a VMM block exported through it: {bindings['export']}.")


def _host() -> dict[str, Any]:
    lines: dict[str, str | None] = {}
    for name in _KERNEL_FILES:
        try:
            lines[name] = Path(name).read_text().strip().splitlines()[0]
        except (OSError, IndexError):
            lines[name] = None
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libc": "-".join(platform.libc_ver()),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "available_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "memlock_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "uid": os.getuid(),
        "c_compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
    } | lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_role(channel: Channel) -> None:
    driver = Driver()
    before = driver.was_initialised()
    driver.initialise()
    channel.send(
        {"version": driver.version(), "initialised_before_cuInit": before}
        | {name: driver.attribute(name) for name in ATTRIBUTES}
        | {"granularity_mib": driver.granularity() / MIB}
    )


def _bindings_role(channel: Channel) -> None:
    from cuda.bindings import driver as cuda

    missing = [name for name in _CALLS if not hasattr(cuda, name)]
    try:
        export = _export_by_bindings(cuda)
    except Exception as error:
        export = f"failed: {type(error).__name__}: {error}"[:300]
    channel.send({"missing": missing, "export": export})


def _export_by_bindings(cuda: Any) -> str:
    """Make and export 2 MiB without a context, by cuda.bindings alone."""

    def checked(results: tuple[Any, ...]) -> Any:
        if int(results[0]):
            raise RuntimeError(str(results[0]))
        return results[1] if len(results) > 1 else None

    checked(cuda.cuInit(0))
    fd_type = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = fd_type
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 0
    handle = checked(cuda.cuMemCreate(2 * MIB, properties, 0))
    fd = int(checked(cuda.cuMemExportToShareableHandle(handle, fd_type, 0)))
    target = os.readlink(f"/proc/self/fd/{fd}")
    imported = Driver()
    imported.import_fd(fd)  # the descriptor is a plain number, good for any other caller
    os.close(fd)
    return f"works (descriptor of {target})"
