"""In every Python process of a job: which of them ask torch for a device, or initialise one. Found by PYTHONPATH."""

import importlib.util
import json
import os
import sys
import traceback

QUESTIONS = {
    "torch.accelerator": (
        "current_accelerator",
        "is_available",
        "device_count",
        "current_stream",
        "synchronize",
        "set_device_index",
    ),
    "torch.cuda": ("is_available", "device_count", "_lazy_init", "current_device", "set_device", "synchronize"),
    "torch.xpu": ("is_available", "device_count", "_lazy_init", "current_device", "set_device", "synchronize"),
}


def write(what):
    place = os.open(os.environ["RECORDED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with open("/proc/self/cmdline") as file:
        command = file.read().split("\0")
    line = {"pid": os.getpid(), "worker": "EVERSTEP_WORKER" in os.environ, "command": command, **what}
    os.write(place, json.dumps(line).encode() + b"\n")
    os.close(place)


def recording(name, function):
    def ask(*arguments, **options):
        if name.endswith("current_accelerator") and not (arguments or options):
            return function()  # which kind torch is built for is no question to a device
        unseen = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # torch's launcher, which is to find nothing
        write({"asked": name, "unseen": unseen, "stack": traceback.format_stack()[-6:-1]})
        return function(*arguments, **options)

    return ask


class Recorder:
    """Puts recorders into these modules as they are imported."""

    def find_spec(self, name, path, target=None):
        if name not in QUESTIONS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def and_record(module):
            execute(module)
            for question in QUESTIONS[name]:
                if hasattr(module, question):
                    setattr(module, question, recording(f"{name}.{question}", getattr(module, question)))

        spec.loader.exec_module = and_record
        return spec


sys.meta_path.insert(0, Recorder())
write({"loaded": True})
