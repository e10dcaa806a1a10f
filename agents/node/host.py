"""A host's resources and their use: from psutil, and, with the extra `gpu` and a device, from NVML."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import psutil

from everstep.comms.control import telemetry_pb2 as pb

SHM = "/dev/shm"


class HostReader:
    """Readings of this host; ratios and rates are since the last one."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer means nothing
        self._gpus = _Gpus()

    def read(self, keeper: Mapping[str, Any] | None = None, keeper_limit_bytes: int = 0) -> pb.HostReading:
        """One reading. `keeper`: what the node's keeper answers to "held"."""
        memory = psutil.virtual_memory()
        network = psutil.net_io_counters(pernic=True)
        wires = [counters for name, counters in network.items() if name != "lo"]
        reading = pb.HostReading(
            cpu_ratio=psutil.cpu_percent() / 100,
            load=os.getloadavg()[0],
            cpus=psutil.cpu_count() or 1,
            memory_used_bytes=memory.total - memory.available,
            memory_bytes=memory.total,
            network_sent_bytes=sum(counters.bytes_sent for counters in wires),
            network_received_bytes=sum(counters.bytes_recv for counters in wires),
            keeper_limit_bytes=keeper_limit_bytes,
        )
        with contextlib.suppress(OSError):
            shm = psutil.disk_usage(SHM)
            reading.shm_used_bytes, reading.shm_bytes = shm.used, shm.total
        for place, path in (("cwd", os.getcwd), ("tmp", tempfile.gettempdir)):
            with contextlib.suppress(OSError):  # either may be gone; the latter is none where nothing can be written
                usage = psutil.disk_usage(path())
                reading.disks.append(pb.DiskReading(place=place, used_bytes=usage.used, total_bytes=usage.total))
        if keeper is not None:
            reading.keeper_bytes = keeper["bytes"] + keeper["parity_bytes"]
            reading.parity_bytes = int(keeper.get("encoded_bytes", 0))
            reading.parity_s = keeper.get("encode_s", 0.0)
        return reading

    def gpus(self) -> list[pb.GpuReading]:
        """The devices; none where NVML, or its binding, is not there."""
        return self._gpus.read()

    def close(self) -> None:
        self._gpus.close()


class _Gpus:
    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml  # pyright: ignore[reportMissingImports]  (optional)
        except ImportError:
            return
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._nvml = pynvml

    def read(self) -> list[pb.GpuReading]:
        nvml = self._nvml
        if nvml is None:
            return []
        found = []
        count = 0
        with contextlib.suppress(nvml.NVMLError):
            count = nvml.nvmlDeviceGetCount()
        for index in range(count):
            reading = pb.GpuReading(index=index)
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                name = nvml.nvmlDeviceGetName(handle)
                reading.name = name.decode() if isinstance(name, bytes) else name
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                reading.memory_used_bytes, reading.memory_bytes = memory.used, memory.total
                reading.busy_ratio = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                reading.temperature_celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
                reading.power_watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            found.append(reading)
        return found

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
