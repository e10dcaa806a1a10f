"""How the observer evaluates a job's event log and its agents' telemetry."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from everstep.agents.analysis import series as series_module
from everstep.agents.analysis.series import Series
from everstep.agents.analysis.suspects import AGAIN_S
from everstep.agents.monitoring.observer import RANK_STEPS, Observer
from everstep.agents.monitoring.screen import concerns
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Cause
from everstep.elastic.protocol.events import SpeedsMeasured
from everstep.elastic.protocol.state import (
    Config,
    Phase,
    Quarantine,
    State,
    Status,
    Trouble,
    Worker,
)
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.units import ModelSpec, ParameterSpec


class Job:
    """A log that a test writes, with a clock that the test sets."""

    def __init__(self, ranks: int = 2) -> None:
        self.now = 100.0
        stage = Stage(0, 1, tuple(range(ranks)))
        model = ModelSpec((1.0,), (ParameterSpec("w", (4,), "float32", 4, (0,)),))
        job = e.Job(steps=50, stages=1, micro_batches=4, global_batch_size=8, model=model, checkpoints=True)
        self.state: State = replace(
            coordinator.initial_state(Config(), 0.0),
            phase=Phase.RUNNING,
            layout=Layout(1, 4, (stage,), (0,), (stage,)),
            job=job,
            workers={rank: Worker(e.WorkerId(rank, 0), "n0") for rank in range(ranks)},
        )
        self.undecided = ""
        clock = lambda: self.now  # noqa: E731
        self.observer = Observer("test", lambda: self.state, clock, clock, lambda: self.undecided)
        self.step = -1

    def line(self, event: str, **fields: Any) -> None:
        self.observer.heard({"at_s": self.now, "event": event, **fields})

    def commit(self, step_s: float, *, again: int = -1) -> None:
        self.now += step_s
        if again >= 0:
            self.line("committed_again", step=again, digest="", same=True)
            return
        self.step += 1
        self.state = replace(self.state, committed=self.step)
        self.line("committed", step=self.step, loss=1.0 / (1 + self.step), generation=1, digest="", protected=-1)

    def recovered(self, total_s: float, reason: str = "worker_died", **fields: Any) -> None:
        phases = {f"{phase}_s": total_s / 6 for phase in series_module.PHASES}
        line = {"ranks": [1], "nodes": [], "generation": 2, "interrupted_step": self.step, "lost_steps": 0, **fields}
        self.line("recovered", reason=reason, why="", redone_micro_batches=3, total_s=total_s, **phases, **line)

    def value(self, name: str, **labels: str) -> float:
        self.observer.page()
        found = self.observer.metrics.registry.get_sample_value(name, labels)
        assert found is not None, name
        return found


def test_time_that_a_recovery_took_is_lost_and_the_rest_is_not() -> None:
    job = Job()
    job.line("started", generation=1)
    for _ in range(10):
        job.commit(1.0)
    job.line("worker_died", rank=1, node="n0", cause="killed by SIGKILL")
    job.commit(3.0)
    job.recovered(2.5)
    job.commit(1.0)
    assert job.value("everstep_lost_seconds_total") == pytest.approx(2.0)
    assert job.value("everstep_productive_seconds_total") == pytest.approx(12.0)
    assert job.value("everstep_goodput_ratio") == pytest.approx(12 / 14)
    assert job.value("everstep_step_typical_seconds") == 1.0
    assert job.value("everstep_recoveries_total", reason="worker_died") == 1
    assert job.value("everstep_recovery_phase_seconds_count", phase="detect", reason="worker_died") == 1
    assert job.value("everstep_lost_micro_batches_total") == 3
    assert job.value("everstep_host_failures_total", host="n0", kind="worker_died") == 1


def test_how_often_versions_are_protected_is_what_workers_say_last() -> None:
    job = Job()
    job.line("started", generation=1)
    assert job.value("everstep_snapshot_interval_steps") == 0
    members = {rank: replace(worker, status=Status.MEMBER) for rank, worker in job.state.workers.items()}
    job.state, worker = replace(job.state, workers=members), members[0]
    for step, every, shown in ((1, 4, 4), (2, 0, 4), (3, 7, 7)):
        told = e.WorkerCommitted(worker.id, step, "opaque", generation=1, every=every)
        job.state, _ = coordinator.step(job.state, told, job.now)
        assert job.value("everstep_snapshot_interval_steps") == shown


def test_a_step_computed_again_is_all_loss() -> None:
    job = Job()
    job.line("started", generation=1)
    for _ in range(5):
        job.commit(1.0)
    job.commit(2.0, again=4)
    assert job.value("everstep_lost_seconds_total") == pytest.approx(2.0)
    assert job.value("everstep_lost_steps_total") == 1
    assert job.value("everstep_steps_total") == 5


def test_goodput_sinks_while_the_job_stands_still() -> None:
    job = Job()
    job.line("started", generation=1)
    for _ in range(10):
        job.commit(1.0)
    job.now += 0.9  # in the middle of an ordinary step
    assert job.value("everstep_goodput_ratio") == pytest.approx(1.0)
    job.now += 9.1
    assert job.value("everstep_goodput_ratio") == pytest.approx(10 / 19)
    assert job.value("everstep_commit_age_seconds") == pytest.approx(10.0)
    job.line("ended", succeeded=True, why="")
    job.now += 1000
    assert job.value("everstep_training_seconds_total") == pytest.approx(19.0)
    assert job.value("everstep_commit_age_seconds") == 0


def test_a_coordinator_that_decides_nothing_says_why() -> None:
    job = Job()
    job.line("started", generation=1)
    for _ in range(10):
        job.commit(1.0)
    job.now += 100.0
    assert job.value("everstep_coordinator_decides") == 1
    assert concerns(job.observer.view())[-1].startswith("no step was committed for ")
    job.undecided = "database or disk is full"
    assert job.value("everstep_coordinator_decides") == 0
    first, *rest = concerns(job.observer.view())
    assert first == "nothing can be decided: database or disk is full"
    assert not any("no step was committed" in line for line in rest), "that is not known here"


def test_every_reason_of_a_recovery_has_series_from_the_start() -> None:
    job = Job()
    for cause in Cause:
        assert job.value("everstep_recoveries_total", reason=cause.value) == 0
        job.recovered(1.0, reason=cause.value)
        assert job.value("everstep_recoveries_total", reason=cause.value) == 1


@pytest.mark.parametrize(("hang", "kind"), [("", "worker_died"), ("silent", "worker_hung"), ("alive", "worker_hung")])
def test_a_death_counts_as_a_hang_by_its_field_alone(hang: str, kind: str) -> None:
    """A script may print that something hung; that is only text."""
    job = Job()
    job.line("node_joined", node="n0", host="h")
    job.line("worker_died", rank=1, node="n0", cause="failed: the queue hung", hang=hang)
    other = "worker_died" if hang else "worker_hung"
    assert job.value("everstep_host_failures_total", host="h", kind=kind) == 1
    assert job.value("everstep_host_failures_total", host="h", kind=other) == 0


def steps(rank: int, first: int, count: int, compute_s: float) -> list[pb.StepTimes]:
    fields = {"micro_batches": 2, "tokens": 64, "samples": 4, "step_s": 0.1}
    return [pb.StepTimes(rank=rank, step=first + n, compute_s=compute_s, **fields) for n in range(count)]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_shorter_last_batch_counts_its_samples(optimizers: int) -> None:
    job = Job()
    assert job.state.job is not None
    described = replace(job.state.job, epochs=2, steps=6 * optimizers, samples=21, last_batch="short")
    job.state = replace(job.state, job=described)
    job.line("started", generation=1)
    for _ in range(5 * optimizers):
        job.commit(1.0)
    assert job.value("everstep_samples_total") == optimizers * (21 + 16)


def test_telemetry_gives_series_tokens_and_targets() -> None:
    job = Job()
    job.line("started", generation=1)
    job.commit(1.0)
    assert job.value("everstep_tokens_total") == 0  # the number of tokens is not known yet
    told = pb.Telemetry(at_s=5.0, unix_s=1000.0, steps=[*steps(0, 0, 3, 0.05), *steps(1, 0, 3, 0.05)], metrics="h:1")
    job.observer.told("n0", told)
    job.commit(1.0)
    assert job.value("everstep_tokens_total") == 2 * 8 * 16
    assert job.value("everstep_samples_total") == 16
    assert json.loads(job.observer.targets().body) == []  # the node is not part of the job
    view = job.observer.view(rank_steps=2)
    json.dumps(view, allow_nan=False)
    assert [len(worker["steps"]) for worker in view["workers"]] == [2, 2]
    assert (view["step"], view["steps"], view["loss"], view["tokens_per_s"]) == (1, 50, 0.5, pytest.approx(128.0))


def test_memory_is_bounded() -> None:
    job = Job()
    job.line("started", generation=1)
    for n in range(40):
        job.observer.told("n0", pb.Telemetry(steps=steps(0, 32 * n, 32, 0.1)))
    assert len(job.observer.ranks[0].steps) == RANK_STEPS
    for _ in range(1500):
        job.commit(0.01)
        job.line("snapshot_interval", every=1)
    assert len(job.observer.series.steps) == series_module.STEPS_KEPT
    assert len(job.observer.series.events) == series_module.EVENTS_KEPT
    assert len(job.observer.series.commit_times) == series_module.STEPS_KEPT
    job.state = replace(job.state, workers={1: job.state.workers[1]})
    job.observer.told("n0", pb.Telemetry())
    assert list(job.observer.ranks) == []  # no series of lost ranks


def test_a_slow_rank_is_called_a_straggler_and_no_longer_when_it_is_level() -> None:
    job = Job(ranks=3)
    first = 0
    for _ in range(6):
        for rank in range(3):
            job.observer.told("n0", pb.Telemetry(steps=steps(rank, first, 4, 0.3 if rank == 2 else 0.1)))
        first += 4
        job.now += 1.0
    assert job.value("everstep_straggler_ranks") == 1
    assert job.value("everstep_straggler_slowdown_ratio", rank="2") == pytest.approx(3.0)
    assert [worker["straggler"] for worker in job.observer.view()["workers"]] == [False, False, True]
    for _ in range(10):
        for rank in range(3):
            job.observer.told("n0", pb.Telemetry(steps=steps(rank, first, 4, 0.1)))
        first += 4
        job.now += 1.0
    assert job.value("everstep_straggler_ranks") == 0


def polled(job: Job) -> list[Any]:
    found = []
    while (event := job.observer.poll()) is not None:
        found.append(event)
    return [event for event in found if not isinstance(event, e.WaitNoticed | SpeedsMeasured)]


def test_what_is_found_is_said_once_and_again_after_a_while() -> None:
    """As events for programs, with the evidence; the view contains it as long as it lasts."""
    job = Job(ranks=3)
    first = 0

    def train(seconds: int, slow_s: float) -> None:
        nonlocal first
        for _ in range(seconds):
            for rank in range(3):
                told = steps(rank, first, 4, slow_s if rank == 2 else 0.1)
                job.observer.told("n0", pb.Telemetry(steps=told))
            first += 4
            job.now += 1.0

    train(8, 0.1)
    assert polled(job) == []
    train(8, 0.3)
    (found,) = polled(job)
    assert isinstance(found, e.StragglerFound)
    assert (found.node, found.rank, found.what, found.again, found.blamed) == ("n0", 2, "compute", False, True)
    assert found.fields["compared_s"] == pytest.approx(0.05)
    assert "the 2 others of its stage 0.05 s" in found.evidence
    (shown,) = job.observer.view()["stragglers"]
    assert (shown["rank"], shown["node"], shown["what"]) == (2, "n0", "compute")
    json.dumps(shown, allow_nan=False)
    job.line("straggler_found", rank=2, node="n0", what="compute", factor=3.0, evidence=found.evidence)
    assert job.value("everstep_stragglers_found_total", kind="compute") == 1
    job.now += AGAIN_S
    train(2, 0.3)
    assert [event.again for event in polled(job)] == [True]
    train(8, 0.1)
    (gone,) = polled(job)
    assert isinstance(gone, e.StragglerGone)
    assert "1.00 times" in gone.evidence
    assert job.observer.view()["stragglers"] == []


def test_a_slow_link_is_found_and_its_ends_are_not() -> None:
    job = Job(ranks=3)
    job.state = replace(job.state, workers={rank: Worker(e.WorkerId(rank, 0), f"n{rank}") for rank in range(3)})

    def links(rank: int) -> list[pb.LinkTimes]:
        return [
            pb.LinkTimes(rank=rank, peer=peer, received_bytes=10**7, receive_s=0.5 if peer == 1 else 0.05, wait_s=0.3)
            for peer in range(3)
            if peer != rank
        ]

    for second in range(16):
        for rank in range(3):
            told = pb.Telemetry(steps=steps(rank, 4 * second, 4, 0.1), links=links(rank), at_s=float(second))
            job.observer.told(f"n{rank}", told)
        job.now += 1.0
    (found,) = polled(job)
    assert (found.what, found.rank, found.node, found.fields["side"]) == ("link", 1, "n1", "sender")
    assert found.factor == pytest.approx(10.0, rel=0.1)
    assert job.value("everstep_straggler_links") == 1
    assert job.value("everstep_straggler_ranks") == 0


def test_hosts_that_are_kept_out_are_shown_with_their_reasons() -> None:
    job = Job()
    trouble = Trouble(90.0, "node_lost", "its stream ended")
    job.state = replace(
        job.state, troubles={"h": (trouble, trouble)}, quarantined={"h": Quarantine(95.0, 195.0, "2 troubles")}
    )
    view = job.observer.view()
    assert view["quarantined"] == 1
    assert view["quarantine"] == [{"host": "h", "for_s": 5.0, "left_s": 95.0, "why": "2 troubles", "nodes": []}]
    assert view["troubles"][0]["count"] == 2
    assert job.value("everstep_quarantined_nodes") == 1


def test_what_means_nothing_is_not_a_number() -> None:
    job = Job()
    assert math.isnan(job.value("everstep_exposure_seconds"))
    assert math.isnan(job.value("everstep_checkpoint_age_seconds"))  # training has not begun
    job.line("started", generation=1)
    job.now += 7
    assert job.value("everstep_checkpoint_age_seconds") == 7
    job.line("checkpoint_saved", version=3, name="x", seconds=0.5, bytes=1000)
    job.now += 2
    assert job.value("everstep_checkpoint_age_seconds") == 2
    assert job.value("everstep_checkpoint_size_bytes") == 1000


def test_a_coordinator_that_took_over_begins_with_what_it_hears() -> None:
    series = Series()
    series.commit({"at_s": 50.0, "event": "committed", "step": 7, "loss": None}, 2)
    series.commit({"at_s": 51.0, "event": "committed", "step": 8, "loss": None}, 2)
    assert series.training_s(51.0) == 1.0
    assert series.goodput(51.0) == 1.0


def speeds(job: Job, factor: float, first: int, count: int = 12) -> dict[int, float] | None:
    """What is measured once rank 1 has taken `factor` times as long for so many steps; None if nothing is reported.

    The machine adopts what is reported.
    """
    found = None
    for n in range(first, first + count):
        job.now += 2.0
        told = [*steps(0, n, 1, 0.05), *steps(1, n, 1, 0.05 * factor)]
        job.observer.told("n0", pb.Telemetry(at_s=job.now, steps=told))
        while (event := job.observer.poll()) is not None:
            if isinstance(event, SpeedsMeasured):
                found = dict(event.speeds)
                job.state = replace(job.state, speeds=found)
    return found


def test_speeds_are_measured_and_reported_when_they_change() -> None:
    job = Job()
    job.line("started", generation=1)
    assert speeds(job, 1.0, 0) is None
    assert speeds(job, 1.15, 100) is None, "that may be noise"
    found = speeds(job, 1.5, 200, 20)
    assert found is not None
    assert found == {1: pytest.approx(1 / 1.5)}
    assert speeds(job, 1.5, 300) is None, "it is known"
    assert speeds(job, 1.15, 400) is None, "it stays what it is until it is level again"
    assert speeds(job, 1.0, 500, 20) == {}


def test_a_coordinator_that_takes_over_sees_a_slow_rank_recover() -> None:
    job = Job()
    job.state = replace(job.state, speeds={1: 0.5})  # as its store says
    assert speeds(job, 2.0, 0) is None
    assert speeds(job, 1.0, 100, 20) == {}


def test_a_slow_rank_that_moves_stays_slow_until_it_is_compared_again() -> None:
    """A stage of its own compares it with its own past there, which is as slow."""
    job = Job()
    assert speeds(job, 2.0, 0, 20) == {1: pytest.approx(0.5)}
    cut = (Stage(0, 1, (0,)), Stage(1, 2, (1,)))
    job.state = replace(job.state, layout=Layout(2, 4, cut, (0,), cut))
    assert speeds(job, 2.0, 100, 30) is None
    together = (Stage(0, 2, (0, 1)),)
    job.state = replace(job.state, layout=Layout(3, 4, together, (0,), together))
    assert speeds(job, 1.0, 200, 30) == {}
