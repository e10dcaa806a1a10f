"""Mistakes of users: one line that says what to change, once, and nothing is left running."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import Settings, resolve
from tests.jobs import JOBS, PROTECTION, Ended, command, everstep
from tests.jobs.interpreter import script
from tests.jobs.ports import free_port

SCRIPT = str(JOBS / "bad_job.py")

ANYWHERE = {
    "batch_size": "global_batch_size (7) must be a multiple of micro_batch_size (2)",
    "layers": "4 stages need at least as many layers, and the model has 3",
    "uncuttable": "Uncuttable cannot be cut into 2 stages: pass an nn.Sequential",
    "small_dataset": "the dataset has 5 samples, fewer than one batch (global_batch_size = 8)",
    "iterable": "Stream ended before it had the samples of micro-batch 1 of step 0: give the job",
    "foreign_parameters": "that the model lacks: build the optimizer from model.parameters()",
    "several_models": "takes a list of models and a list of optimizers: the optimizers are a SGD",
    "several_optimizers": "the optimizer must be one torch Optimizer, got list: run.prepare([g, d], [opt_g, opt_d]",
    "one_of_two_steps": "optimizers[1].step() was not called in a turn of the loop: each turn has one call of",
    "lbfgs": "LBFGS is not supported: it evaluates the loss of all data several times a step",
    "average_of_another": "run.average was called with another model than run.prepare or run.steps",
    "turns_on_a_stream": "Stream is a stream, and alternating updates of several optimizers need each batch several",
    "optimizer_state": "the optimizer has state already, by load_state_dict() or a step() in front of run.prepare",
    "nothing": "nothing returned without calling run.prepare(...) or run.steps(...)",
    "prepare_stages": "run.prepare drives one stage, and the job has stages=2: use run.steps(...)",
    "scheduler": "ExponentialLR was built on the optimizer, and its step() was not called for a micro-batch of step 0",
    "two_schedulers": "ExponentialLR.step() was called in the loop over run.prepare's batches: the runtime steps one",
    "plateau": "scheduler=ReduceLROnPlateau: it needs a metric",
    "plateau_in_loop": "ReduceLROnPlateau.step() was called in the loop over run.prepare's batches: the loss of",
    "scheduler_without_epochs": "scheduler_every='epoch' is for a job with epochs=, whose loop is over run.epochs()",
    "scheduler_every_turn": "scheduler_every must be 'step' or 'epoch', got 'turn'",
    "scheduler_in_batches": "ReduceLROnPlateau.step() was called in the loop over the batches of an epoch, with",
    "foreign_scheduler": "scheduler= takes a scheduler of torch.optim.lr_scheduler, got CosineOfAnotherLibrary: leave",
    "caught_in_its_turn": "the gradient of '0.weight' was changed between backward() and optimizer.step()",
    "caught_around_the_loop": "the gradient of '0.weight' was changed between backward() and optimizer.step()",
    "caught_around_steps": "parameter '0.weight' was changed by the script",
    "clipped_by_torch": "the gradient of '0.weight' was changed between backward() and optimizer.step()",
    "scaled_gradient": "write run.clip_grad_norm_(x) for torch.nn.utils.clip_grad_norm_(model.parameters(), x)",
    "clipped_through_data": "the gradient of '0.weight' was changed between backward() and optimizer.step()",
    "grad_scaler": "this GradScaler was not handed over",
    "loads_optimizer": "optimizer.load_state_dict() was called after run.prepare or run.steps",
    "unfrozen": "parameter '0.weight' was frozen at run.prepare or run.steps, and has requires_grad=True now",
    "added_group": "a parameter group was added to, or changed in, the optimizer after run.prepare or run.steps",
    "rate_of_each_turn": "lr of parameter group 0 was",
    "collective_in_a_turn": "run.reduce(sum) was called in the middle of a step, where ranks have different",
    "call_in_a_turn": "run.mean was called in the middle of a step, where ranks have different micro-batches",
    "synced_in_a_group": "'1' is a SyncBatchNorm, whose forward gathers statistics from all ranks, and in an",
    "skips_beside_steps": "run.skip() is for a loop over run.prepare's batches",
    "stops_for_a_number": "run.stop(why): the reason is a text, got 7",
    "tells_nothing": "run.on_step(function): it is called with every step, got None",
    "steps_behind_skip": "optimizer.step() was called behind run.skip(): after it, continue",
    "no_step": "To leave a micro-batch out, call run.skip(), then continue",
    "loss_shape": "loss_fn must return a tensor with one element",
    "buffer_changes": "changes its buffer 'calls' in forward",
    "attribute_changes": "layer 0 (Averaging) changes its attribute 'mean' in forward",
    "buffer_between_steps": "the script changed the buffer 'scale' of layer 0 (Averaging) between steps 1 and 2",
    "frozen_teacher": "the script changed the frozen parameter 'weight' of layer 0 (ModuleDict), module 'teacher'",
    "loss_of_nothing": "the loss of micro-batch 0 of step 0 depends on no trainable parameter",
    "lazy": "parameter '0.weight' has no shape yet, as its layer is lazy: run one forward",
    "loaded_too_late": "parameter '0.weight' was changed by the script before or in the first step",
}
IN_A_JOB = {
    "workers": "3 stages need at least as many workers; there are 2",
    "models_differ": "built a different model than the others (for example 3.bias, 3.weight)",
    "values_differ": "initialised its model with different values than the others",
    "settings_differ": "give every rank the same settings",
    "optimizers_differ": "built a different optimizer than the others",
    "states_differ": "differs in step 1: expected the same on all ranks, got 0.0 on rank 0 and 0.5 on rank 1. Set it",
    "call_of_one_rank": "and rank 1 continues with step 1 without it: all ranks have to make the same calls",
    "rate_of_each_rank": "rank 0 set lr of parameter group 0 to 0.3 and rank 1 to 0.15: work it out from what is equal",
}

LAUNCHED = """
import json, os, sys, tempfile
from everstep import cli
from everstep.agents.node.preloader import single_threaded
with single_threaded():
    import everstep.agents.launch.command
results = {}
for name, line in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:  # as `everstep run LINE`
            os.setsid(), os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            sys.argv = ["everstep", "run", *line.split()]
            os._exit(cli.main())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        results[name] = status, output.read().decode()
print(json.dumps(results))
"""


def launched(pool: ThreadPoolExecutor, lines: dict[str, str]) -> dict[str, Ended]:
    """The results of `everstep run LINE`, by the names of the lines."""

    def run(part: dict[str, str]) -> dict[str, Ended]:
        ended = command(["-c", LAUNCHED, json.dumps(part)])
        assert ended.status == 0, ended.stderr
        return {name: Ended(status, "", text) for name, (status, text) in json.loads(ended.stdout).items()}

    names = list(lines)
    parts = [{name: lines[name] for name in names[number::3]} for number in range(3)]
    return {name: ended for found in pool.map(run, parts) for name, ended in found.items()}


@pytest.mark.soak
def test_alone() -> None:
    """The script started by itself, without the launcher."""
    for case, text in ANYWHERE.items():
        ended = script(SCRIPT, case)
        assert text in ended.error(), (case, ended)
    assert ANYWHERE["iterable"] in command([SCRIPT, "iterable"]).error()


@pytest.mark.soak
def test_in_a_job() -> None:
    """The same under the launcher, on two ranks; and mistakes that require ranks to differ."""
    cases = {
        case: ANYWHERE[case] for case in ("batch_size", "uncuttable", "nothing", "scheduler", "no_step")
    } | IN_A_JOB
    with ThreadPoolExecutor(3) as pool:
        ended = launched(pool, {case: f"--nproc-per-node 2 {SCRIPT} {case}" for case in cases})
    for case, text in cases.items():
        line = ended[case].error()
        assert text in line, (case, line)
        assert "rank " in line or case == "workers", (case, line)
        assert ended[case].status == 1


LINES = {
    "no_such.py": "no such script: no_such.py",
    "--rdzv-endpoint=nowhere:port --nnodes=2 SCRIPT": "--rdzv-endpoint must be HOST:PORT, got 'nowhere:port'",
    "--rdzv-endpoint=:29 SCRIPT": "--rdzv-endpoint must be HOST:PORT, got ':29'",
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:FREE --rdzv-conf=join_timeout=2 SCRIPT": "only 1 of at least 2 nodes joined",
    "--rdzv-endpoint=127.0.0.1:TAKEN SCRIPT": "is in use: choose another port in --rdzv-endpoint",
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:TAKEN --rdzv-conf=join_timeout=1 SCRIPT": "no coordinator answers at",
    "--nnodes=2 --rdzv-endpoint=192.0.2.1:29400 --rdzv-conf=join_timeout=1 SCRIPT": "no coordinator answers at",
    "--local-addr=192.0.2.1 SCRIPT": "the snapshot keeper of node",
    "--es-preload=no_such_module SCRIPT": "no_such_module",
    "--nnodes=2 --rdzv-endpoint=no.such.host.invalid:29400 --rdzv-conf=join_timeout=1 SCRIPT": (
        "this host knows no address of no.such.host.invalid"
    ),
    "--rdzv-conf=join_timeout=soon SCRIPT": "join_timeout must be a number of seconds, got 'soon'",
    "--rdzv-conf=is_host=maybe SCRIPT": "is_host must be true or false, got 'maybe'",
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:TAKEN --rdzv-conf=is_host=1 SCRIPT": "is in use: choose another port",
    "--nnodes=2 --rdzv-endpoint=192.0.2.1:29400 --rdzv-conf=is_host=1 --es-insecure-network SCRIPT": (
        "cannot listen at 192.0.2.1:29400: Cannot assign requested address"
    ),
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:FREE --rdzv-conf=is_host=0,join_timeout=1 SCRIPT": "no coordinator answers",
    "--nnodes=two SCRIPT": "--nnodes",
    "--es-store=etcd://127.0.0.1:FREE SCRIPT": "no member of etcd answers as it should (Connection refused)",
    "--es-store=etcd:// SCRIPT": "--es-store must be etcd://HOST:PORT",
    "--nproc-per-node=many SCRIPT": "many",
    "--es-events=/no/such/folder/events SCRIPT": "--es-events /no/such/folder/events: No such file or directory",
    "--es-protection=nonsense SCRIPT": "one of parity, replay, replicate, none, got 'nonsense' (rank 0)",
    "--es-node-losses=0 SCRIPT": "node_losses must be a whole number of at least 1, got 0 (rank 0)",
    "--es-snapshot-every=-3 SCRIPT": 'snapshot_every must be "auto" or a whole number of at least 1, got -3 (rank 0)',
    "--es-node-mtbf-hours=0 SCRIPT": "--es-node-mtbf-hours 0: give hours, more than none",
    "--es-preemption-endpoint=host SCRIPT": "--es-preemption-endpoint: expected http://HOST[:PORT], got 'host'",
    "--es-keeper-memory=0 SCRIPT": "--es-keeper-memory: expected a size of more than nothing, got '0'",
    "--es-keeper-memory=nonsense SCRIPT": "--es-keeper-memory: expected a size such as 512MiB or 8G, got 'nonsense'",
    "--es-keeper-memory=-1GiB SCRIPT": "--es-keeper-memory: expected a size such as 512MiB or 8G, got '-1GiB'",
}


def test_command_lines() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken, ThreadPoolExecutor(3) as pool:

        def written(line: str) -> str:
            for name, value in (
                ("TAKEN", str(taken.getsockname()[1])),
                ("FREE", str(free_port())),
                ("SCRIPT", f"{SCRIPT} nothing"),
            ):
                line = line.replace(name, value)
            return line

        ended = launched(pool, {line: written(line) for line in LINES})
    for line, text in LINES.items():
        assert text in ended[line].error(), (line, ended[line])


def test_a_module_that_cannot_be_imported_after_the_node_has_joined(tmp_path: Path) -> None:
    """The error is all that is said: not that a node is lost, which is this one."""
    (tmp_path / "late_module.py").write_text("import time\ntime.sleep(3)\nimport no_such_module\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    ended = command(["-m", "everstep", "run", "--es-preload=late_module", SCRIPT, "nothing"], environment)
    assert ended.status == 2
    assert ended.error() == "--es-preload: No module named 'no_such_module'"


SETTINGS = {
    ("NODE_LOSSES", "-1"): "node_losses must be a whole number of at least 1, got -1",
    ("NODE_LOSSES", "few"): "EVERSTEP_NODE_LOSSES must be a whole number, got 'few'",
    ("SNAPSHOT_EVERY", "often"): "EVERSTEP_SNAPSHOT_EVERY must be a whole number, got 'often'",
    ("SNAPSHOT_BUDGET", "-1"): "snapshot_budget must be a share of a step's time, more than 0, such as 0.02; got -1.0",
    ("SNAPSHOT_BUDGET", "nan"): "snapshot_budget must be a share of a step's time, more than 0, such as 0.02; got nan",
    ("SNAPSHOT_BUDGET", "little"): "EVERSTEP_SNAPSHOT_BUDGET must be a number, got 'little'",
    ("ON_LOSS", "cry"): "on_loss must be one of checkpoint, neighbors, stop, got 'cry'",
    ("ON_CORRUPTION", ""): "on_corruption must be one of repair, evict, got ''",
    ("VERIFY_EVERY", "-1"): "verify_every must be a whole number of at least 0, got -1",
}


@pytest.mark.parametrize(("name", "text"), SETTINGS, ids=lambda value: value)
def test_settings(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the flags become in a worker; some of them are passed through the command lines above."""
    monkeypatch.setenv(f"EVERSTEP_{name}", text)
    with pytest.raises(UsageError, match=f"^{re.escape(SETTINGS[name, text])}$"):
        resolve(Settings(steps=1, global_batch_size=2, micro_batch_size=1))


def test_a_keeper_too_small_for_the_job(tmp_path: Path) -> None:
    """Before the first step, an error names the node, the memory it would need, and its limit."""
    arguments = json.dumps({"out": str(tmp_path), "steps": 4, "stages": 1})
    ended = everstep("run", "--es-keeper-memory=1.5MiB", str(JOBS / "gpt_job.py"), arguments)
    assert ended.status == 1
    pattern = (
        r"node \S+ \(127\.0\.0\.1\) needs (\S+) MiB of memory for snapshots and parity, and may use 1\.5 MiB: raise "
    )
    found = re.match(pattern, ended.error())
    assert found, ended.stderr
    assert 1.5 < float(found[1]) < 4
    assert not any(tmp_path.glob("state-*"))


def test_an_exception_ends_the_job_once(tmp_path: object) -> None:
    """The user's traceback and the rank; exit 1, no restart; the error files that torch's tools read."""
    error_file = f"{tmp_path}/error.json"
    ended = everstep(
        "run",
        "--nproc-per-node=2",
        "--max-restarts=3",
        f"--log-dir={tmp_path}",
        SCRIPT,
        "exception",
        environment={"TORCHELASTIC_ERROR_FILE": error_file},
    )
    assert ended.status == 1
    first, *lines = ended.stderr.strip().splitlines()
    assert first.startswith(PROTECTION)
    assert lines[-1] == "everstep: error: ValueError: the user's own mistake (rank 1)"
    assert lines[0] == "Traceback (most recent call last):"
    assert "bad_job.py" in lines[1]
    assert ended.stderr.count("Traceback") == 1
    with open(error_file) as stream:
        assert "the user's own mistake" in stream.read()


def test_a_user_exit_ends_the_job_once(tmp_path: object) -> None:
    ended = everstep("run", "--nproc-per-node=2", "--max-restarts=3", f"--log-dir={tmp_path}", SCRIPT, "exits")
    assert ended.status == 1
    assert ended.stderr.strip().splitlines()[-1] == "everstep: error: SystemExit: 3 (rank 0)"


def test_alone_an_exception_is_the_users() -> None:
    ended = command([SCRIPT, "exits"])
    assert ended.status == 3
    assert ended.stderr == ""


@pytest.mark.parametrize("arguments", [["status", "127.0.0.1:1"], ["status", "nowhere"], ["wrong"]])
def test_other_commands(arguments: list[str]) -> None:
    ended = everstep(*arguments, environment={"PYTHONSTARTUP": ""}, timeout_s=20)
    assert ended.status == 2
    assert ended.stderr.startswith("everstep: error: ")
    assert "Traceback" not in ended.stderr


def test_help_needs_no_job() -> None:
    for arguments in (["--help"], ["--version"], ["run", "--help"], ["coordinator", "--help"]):
        ended = command(["-m", "everstep", *arguments])
        assert ended.status == 0
        assert ended.stderr == ""
