"""A bit flips in live memory, where nothing has a checksum: the replicas tell, the run stays the undisturbed one."""

from __future__ import annotations

import signal
from functools import lru_cache
from pathlib import Path

import pytest

from tests.jobs import Result, assert_same_run, assert_same_state, run_job, wait_until
from tests.jobs.hosts import HostJob, Hosts

STEPS = 12


@lru_cache(maxsize=2)
def reference(dtype: str = "float32") -> Result:
    return run_job(nproc=1, steps=STEPS, dtype=dtype)


@pytest.mark.parametrize("policy", ["repair", "evict"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_flipped_bit_of_a_value(policy: str, stages: int) -> None:
    """Once of values that the rank only reads, once of values that it owns: no majority of two, yet the right one."""
    faults = [
        {"rank": 1, "phase": "compute", "step": 3, "after": 1, "kind": "flip"},
        {"rank": 0, "phase": "compute", "step": 7, "kind": "flip-owned"},
    ]
    flags = ["--es-verify-every=1", f"--es-on-corruption={policy}"]
    result = run_job(nproc=2 * stages, stages=stages, steps=STEPS, faults=faults, flags=flags)
    assert_same_run(result, reference())
    found = [(e["where"], e["rank"]) for e in result.named("corruption")]
    assert found == [("replica", 1), ("replica", 0)]
    assert len(result.named("worker_died")) == (2 if policy == "evict" else 0)


def test_a_value_that_was_damaged_before_its_snapshot() -> None:
    """The snapshot agrees with the damage; the version before it and its gradient do not."""
    faults = [{"rank": 0, "phase": "commit", "step": 4, "kind": "flip-owned"}]
    result = run_job(nproc=3, steps=STEPS, faults=faults, flags=["--es-verify-every=1"])
    assert_same_run(result, reference())
    assert [(e["where"], e["rank"]) for e in result.named("corruption")] == [("replica", 0)]


@pytest.mark.parametrize("flags", [[], ["--es-tcp"]])
def test_a_damaged_frame(flags: list[str]) -> None:
    """It is not believed; a new generation sends again what is needed, and computes nothing again."""
    faults = [{"rank": 0, "phase": "reduce", "step": 3, "kind": "flip-frame"}]
    faults += [{"rank": 2, "phase": "compute", "step": 6, "after": 1, "kind": "flip-frame"}]
    result = run_job(nproc=4, stages=2, steps=STEPS, faults=faults, flags=flags)
    assert_same_run(result, reference())
    assert {e["where"] for e in result.named("corruption")} == {"frame"}
    assert {e["rank"] for e in result.named("corruption")} & {0, 2}
    assert [e["lost_steps"] for e in result.named("recovered")] == [0, 0]
    assert not result.named("worker_died")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
def test_a_damaged_backup(dtype: str, tmp_path: Path) -> None:
    """Replay: the copy that no rank computes with is compared too, and made again from its owner's keeper.

    Of a bfloat16 model the bit is one of the master that rounding hides.
    """
    faults = [{"rank": 1, "phase": "compute", "step": 5, "kind": "flip-backup"}]
    faults += [{"rank": 0, "phase": "compute", "step": 9, "kind": "node"}]
    flags = ["--es-protection=replay", "--es-verify-every=2", f"--log-dir={tmp_path}/logs"]
    with Hosts(2) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="2:2", steps=STEPS, dtype=dtype)
        job.launch(0, 1, flags=flags, faults=faults)
        wait_until(lambda: job.events("ended"), 60, "the job has ended")
        up = [host for host, launcher in hosts.launchers.items() if launcher.poll() != -signal.SIGKILL]
        result = job.result(*up)
    rank = 1
    assert [(e["where"], e["rank"]) for e in result.named("corruption")] == [("backup", rank)]
    assert result.losses() == {k: v for k, v in reference(dtype).losses().items() if k in result.losses()}
    assert_same_state(result.state(rank), reference(dtype).state())


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["flip", "flip-owned"])
def test_a_bit_that_flips_while_a_step_is_computed(kind: str) -> None:
    """It is detected in that step, whether or not a comparison is due, and repaired."""
    faults = [{"rank": 0, "phase": "compute", "step": 3, "kind": kind}]
    result = run_job(nproc=2, steps=STEPS, faults=faults, flags=["--es-verify-every=0"])
    assert_same_run(result, reference())
    assert [(e["where"], e["rank"]) for e in result.named("corruption")] == [("replica", 0)]


@pytest.mark.soak
def test_unless_replicas_are_compared_the_result_is_another() -> None:
    """The fault is real: what is damaged before its values are remembered makes the run differ."""
    faults = [{"rank": 0, "phase": "commit", "step": 3, "kind": "flip-owned"}]
    result = run_job(nproc=2, steps=STEPS, faults=faults, flags=["--es-verify-every=0"])
    assert result.status == 0
    digests = [[e["digest"] for e in r.named("committed")] for r in (result, reference())]
    assert digests[0] != digests[1]
