"""The node agent's machine: its reaction to every event, and what no order of events may lead to."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from everstep.elastic.protocol import agent
from everstep.elastic.protocol import agent_events as a
from everstep.elastic.protocol.agent import AgentPhase as P
from everstep.elastic.protocol.agent_state import WorkerStage
from everstep.elastic.protocol.events import WorkerId

CONFIG = agent.AgentConfig(node="n", slots=2, rejoin_s=60.0, coordinator_wait_s=300.0, shutdown_timeout_s=30.0)
FAILED = a.NodeOutcome(False, "a rank failed", rank=0)


def w(rank: int, incarnation: int = 0) -> WorkerId:
    return WorkerId(rank, incarnation)


class Agent:
    """A machine that receives one event after the other; the invariants are checked after each."""

    def __init__(self, config: agent.AgentConfig = CONFIG) -> None:
        self.state = agent.new_agent(config)
        self.now = 100.0

    def __call__(self, event: a.Event, after_s: float = 0.0) -> list[a.Instruction]:
        self.now += after_s
        self.state, instructions = agent.step(self.state, event, self.now)
        assert agent.violations(self.state) == []
        return instructions

    def serve(self, *workers: WorkerId) -> None:
        """Join the job, with these workers running."""
        self(a.PreloaderReady())
        self(a.Welcomed())
        self(a.HealthChecked())
        self(a.StartOrdered(workers))
        for worker in workers:
            self(a.WorkerForked(worker))


def serving(*workers: WorkerId) -> Agent:
    one = Agent()
    one.serve(*workers)
    return one


def in_phase(phase: P) -> Agent:
    """An agent in a phase, with workers 0.0 and 1.0 where the phase allows workers."""
    one = Agent()
    if phase in agent.RUNS:
        one.serve(w(0), w(1))
    if phase is P.FENCED:
        one(a.FenceOrdered("x"))
    elif phase is P.ENDING or phase is P.ENDED:
        one(a.EndOrdered(FAILED))
    elif phase is P.REJOINING:
        one(a.FenceOrdered("x"))
    elif phase in (P.CHECKING, P.UNFIT):
        one(a.Welcomed())
        if phase is P.UNFIT:
            one(a.HealthChecked("it is hot"))
    assert one.state.phase is phase
    return one


SAMPLES: dict[type, a.Event] = {
    a.HealthChecked: a.HealthChecked("it is hot"),
    a.JoinRefused: a.JoinRefused("full"),
    a.FenceOrdered: a.FenceOrdered("silent"),
    a.StartOrdered: a.StartOrdered((w(5),)),
    a.KillOrdered: a.KillOrdered((w(0),)),
    a.EndOrdered: a.EndOrdered(FAILED),
    a.WorkerDefied: a.WorkerDefied(w(0), "it does not listen"),
    a.StopAsked: a.StopAsked("stopped by SIGINT"),
    a.LeaveAsked: a.LeaveAsked("stopped by SIGTERM"),
    a.PreemptionNoticed: a.PreemptionNoticed("aws gives notice"),
    **{kind: kind(w(0)) for kind in (a.WorkerSpoke, a.WorkerMoved, a.WorkerHung, a.MainThreadFailed, a.WorkerGone)},
}


def sample(kind: type, phase: P) -> a.Event:
    return SAMPLES[kind] if kind in SAMPLES else kind()


KINDS = a.Event.__args__  # type: ignore[attr-defined]


@pytest.mark.parametrize("phase", P)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_table_says_what_every_event_is_in_every_phase(phase: P, kind: type) -> None:
    place = (phase, kind)
    assert not (place in agent.HANDLED and place in agent.LATE)
    one = in_phase(phase)
    before = one.state
    if kind is a.WorkerForked:
        event: a.Event = a.WorkerForked(w(0))
    else:
        event = sample(kind, phase)
    if place in agent.LATE:
        assert one(event) == []
        assert one.state.late == before.late + 1
    elif place not in agent.HANDLED or kind in (a.WorkerForked,) or (kind is a.StartOrdered and phase is P.SERVING):
        with pytest.raises(agent.IllegalAgentEvent, match=kind.__name__):  # 0.0 is forked, both slots are taken
            one(event)
        assert one.state is before
    else:
        one(event)


def test_every_phase_is_reached() -> None:
    assert {in_phase(phase).state.phase for phase in P} == set(P)


def test_an_illegal_event_tells_its_story() -> None:
    one = serving(w(0))
    with pytest.raises(agent.IllegalAgentEvent) as error:
        one(a.Welcomed())
    assert "node n is serving, where Welcomed cannot happen" in str(error.value)
    assert "joining: Welcomed, checking: HealthChecked, serving: StartOrdered, serving: WorkerForked" in str(
        error.value
    )


# ---------------------------------------------------------------- out of the job, and back


def test_a_fenced_node_kills_its_workers_and_asks_again_when_they_are_gone() -> None:
    one = serving(w(0), w(1))
    say, *rest = one(a.FenceOrdered("it was silent"))
    assert isinstance(say, a.Say)
    assert rest == [a.KillWorker(w(0), agent.NODE_LOST), a.KillWorker(w(1), agent.NODE_LOST), a.EndKeeper()]
    assert one(a.StartOrdered((w(0, 1),))) == []  # it arrived before the node was fenced
    assert one(a.WorkerGone(w(1))) == []
    assert one(a.WorkerGone(w(0))) == [a.JoinAgain("n-2")]
    one(a.Welcomed())
    assert one(a.HealthChecked()) == [a.Announce(first=False)]


def test_a_worker_that_is_being_forked_while_its_node_is_fenced_is_killed() -> None:
    one = Agent()
    one(a.PreloaderReady())
    one(a.Welcomed())
    one(a.HealthChecked())
    assert one(a.StartOrdered((w(0),), "order")) == [a.PrepareWorker(w(0), 0, "order"), a.ForkWorker(w(0))]
    one(a.FenceOrdered("it was silent"))
    assert one.state.phase is P.FENCED
    assert one(a.WorkerForked(w(0))) == [a.KillWorker(w(0), agent.NODE_LOST)]
    assert one(a.WorkerGone(w(0))) == [a.JoinAgain("n-2")]


def test_a_fenced_node_tries_to_come_back_only_for_so_long() -> None:
    one = in_phase(P.REJOINING)
    one(a.TimePassed(), after_s=60.0)
    assert one.state.phase is P.REJOINING
    one(a.TimePassed(), after_s=0.1)
    assert one.state.phase is P.ENDED
    assert one.state.outcome is not None
    assert one.state.outcome.why == "this node counts as lost, and no coordinator could be reached for 60 s"


def test_a_node_that_was_to_stop_does_not_come_back() -> None:
    one = serving(w(0))
    assert one(a.StopAsked("stopped by SIGINT")) == [a.AskStop("stopped by SIGINT")]
    one(a.FenceOrdered("it was silent"))
    assert one(a.WorkerGone(w(0))) == []
    assert one.state.outcome == a.NodeOutcome(False, "this node counts as lost, and stopped by SIGINT")


def test_a_node_without_coordinator_and_progress_fences_itself() -> None:
    one = serving(w(0))
    for step in range(3):  # it continues to train
        assert one(a.TimePassed(10.0, ((w(0), step),)), after_s=299.0) == []
    assert one(a.TimePassed(900.0, ((w(0), 2),)), after_s=300.0) == []
    found = one(a.TimePassed(901.0, ((w(0), 2),)), after_s=0.1)
    assert a.KillWorker(w(0), agent.NODE_LOST) in found
    assert one.state.phase is P.FENCED


def test_a_coordinator_that_is_heard_or_a_worker_past_training_ends_the_wait() -> None:
    for event in (a.TimePassed(1.0, ((w(0), 2),)), a.TimePassed(901.0, ((w(0), 2),), after=True)):
        one = serving(w(0))
        one(a.TimePassed(10.0, ((w(0), 2),)))
        one(event, after_s=299.0)
        one(a.TimePassed(900.0, ((w(0), 2),)), after_s=2.0)
        assert one(a.TimePassed(901.0, ((w(0), 2),)), after_s=299.0) == []


def test_a_node_that_is_not_fit_waits_for_an_answer() -> None:
    one = in_phase(P.UNFIT)
    one(a.TimePassed(), after_s=5.0)
    assert one.state.phase is P.UNFIT
    one(a.TimePassed(), after_s=0.1)
    assert one.state.outcome is not None
    assert one.state.outcome.unfit
    assert "node n is not fit to join: it is hot" in one.state.outcome.why


# ---------------------------------------------------------------- workers


def test_new_workers_wait_until_those_before_them_are_gone() -> None:
    one = serving(w(0), w(1))
    assert one(a.MainThreadFailed(w(0))) == [a.ReportDeath(w(0))]
    assert one(a.StartOrdered((w(0, 1),))) == [a.PrepareWorker(w(0, 1), 0, None)]
    assert one(a.WorkerGone(w(0))) == [a.ForkWorker(w(0, 1))]


def test_a_restart_ends_all_workers_first() -> None:
    one = serving(w(0), w(1))
    found = one(a.KillOrdered((w(0), w(1))))
    assert found == [a.ForgetFailures(), a.TerminateWorker(w(0)), a.TerminateWorker(w(1))]
    assert one(a.WorkerGone(w(0))) == []  # not reported
    assert len(one(a.StartOrdered((w(0, 1), w(1, 1))))) == 2  # prepared only
    assert one(a.TimePassed(), after_s=30.0) == []
    assert one(a.TimePassed(), after_s=0.1) == [a.KillWorker(w(1), "it did not end when asked to")]
    assert one(a.TimePassed(), after_s=0.1) == []
    assert one(a.WorkerGone(w(1))) == [a.ForkWorker(w(0, 1)), a.ForkWorker(w(1, 1))]


def test_a_worker_that_is_killed_before_it_is_forked_never_runs() -> None:
    one = Agent()
    one(a.Welcomed())
    one(a.HealthChecked())
    one(a.StartOrdered((w(0), w(1))))  # the preloaded process is not ready
    assert one(a.KillOrdered((w(0), w(1)))) == [a.ForgetFailures(), a.DropWorker(w(0)), a.DropWorker(w(1))]
    one(a.StartOrdered((w(0, 1), w(1, 1))))
    assert one(a.PreloaderReady()) == [a.ForkWorker(w(0, 1)), a.ForkWorker(w(1, 1))]
    one(a.KillOrdered((w(0, 1),)))
    assert one(a.WorkerForked(w(0, 1))) == [a.TerminateWorker(w(0, 1))]


def test_a_lost_preloaded_process_takes_nothing_with_it_that_it_had_not_forked() -> None:
    one = Agent()
    one(a.PreloaderReady())
    one(a.Welcomed())
    one(a.HealthChecked())
    one(a.StartOrdered((w(0), w(1))))
    one(a.WorkerForked(w(0)))
    assert one(a.PreloaderLost()) == [a.StartPreloader()]
    assert one(a.WorkerGone(w(0))) == [a.ReportDeath(w(0))]
    assert one(a.PreloaderReady()) == [a.ForkWorker(w(1))]


def test_the_stacks_of_a_hung_worker_are_taken_before_it_is_killed() -> None:
    one = serving(w(0))
    assert one(a.WorkerHung(w(0))) == [a.AskStacks(w(0))]
    assert one(a.WorkerHung(w(0)), after_s=0.5) == []
    one(a.WorkerMoved(w(0)))
    assert one(a.WorkerHung(w(0)), after_s=9.0) == [a.AskStacks(w(0))]
    assert one(a.WorkerHung(w(0), stacks=True), after_s=0.1) == [a.KillHung(w(0))]
    assert one(a.WorkerHung(w(0)), after_s=2.0) == []  # only once


@pytest.mark.parametrize("event", [a.WorkerHung(w(0), stopped=True), a.WorkerHung(w(0))], ids=["stopped", "mute"])
def test_a_worker_that_writes_no_stacks_is_killed_all_the_same(event: a.WorkerHung) -> None:
    one = serving(w(0))
    one(event)
    assert one(event, after_s=0.1 if event.stopped else agent.STACKS_S) == [a.KillHung(w(0))]


def test_vacant_ranks_get_free_slots_and_no_slot_has_two_workers() -> None:
    one = serving(w(0))
    assert one(a.StartOrdered((w(7),)))[0] == a.PrepareWorker(w(7), 1, None)
    with pytest.raises(agent.IllegalAgentEvent, match="1 ranks"):
        one(a.StartOrdered((w(3),)))
    with pytest.raises(agent.IllegalAgentEvent, match="run already"):
        one(a.StartOrdered((w(7, 1),)))


# ---------------------------------------------------------------- the end


def test_workers_hear_of_the_end_and_have_a_grace() -> None:
    one = serving(w(0), w(1))
    one(a.WorkerSpoke(w(0)))
    told = one(a.EndOrdered(FAILED))
    assert told == [
        *(a.TellEnded(w(0), failed=True), a.TerminateWorker(w(0), stopping=True)),
        *(a.TellEnded(w(1), failed=False), a.TerminateWorker(w(1), stopping=True)),
    ]
    assert one(a.TimePassed(), after_s=agent.END_GRACE_S) == []
    assert one(a.TimePassed(), after_s=0.1) == [a.KillWorker(w(0), agent.JOB_OVER)]
    assert one(a.TimePassed(), after_s=27.0) == [a.KillWorker(w(1), agent.JOB_OVER)]
    one(a.WorkerGone(w(0)))
    assert one.state.phase is P.ENDING
    assert one(a.WorkerGone(w(1))) == []
    assert one.state.phase is P.ENDED


def test_a_released_node_ends_with_success_and_asks_nobody_to_end() -> None:
    one = serving(w(0))
    why = "node n has handed over"
    assert one(a.EndOrdered(a.NodeOutcome(True, why, left=True))) == [a.Say(why), a.TellEnded(w(0), failed=False)]
    one(a.WorkerGone(w(0)))
    assert one.state.outcome is not None
    assert one.state.outcome.left


def test_a_notice_of_preemption_drains_the_node_and_a_signal_after_it_does_no_more() -> None:
    one = serving(w(0))
    for _ in range(2):
        assert one(a.PreemptionNoticed("aws gives notice")) == [a.AskDrain("aws gives notice")]
    assert one(a.LeaveAsked("stopped by SIGTERM")) == [a.AskDrain("stopped by SIGTERM")]
    assert one(a.PreemptionNoticed("aws gives notice")) == [a.AskDrain("aws gives notice")]
    assert one.state.phase is P.SERVING


def test_a_node_that_is_preempted_does_not_join_again() -> None:
    one = serving(w(0))
    one(a.FenceOrdered("silent"))
    assert one(a.PreemptionNoticed("aws gives notice")) == []
    one(a.WorkerGone(w(0)))
    assert one.state.phase in (P.ENDING, P.ENDED)
    assert one.state.outcome is not None
    assert "aws gives notice" in one.state.outcome.why


def test_asked_twice_to_stop_a_node_ends_at_once() -> None:
    one = serving(w(0))
    assert one(a.LeaveAsked("stopped by SIGTERM")) == [a.AskDrain("stopped by SIGTERM")]
    found = one(a.LeaveAsked("stopped by SIGTERM"))
    assert found == [a.KillWorker(w(0), "stopped by SIGTERM"), a.AskStop("stopped by SIGTERM")]
    assert one.state.phase is P.ENDING


def test_a_node_that_nobody_listens_to_ends() -> None:
    one = serving(w(0))
    assert one(a.OutboxFull()) == [a.KillWorker(w(0), agent.FULL)]


# ---------------------------------------------------------------- any order of events


class Machine:
    """A node whose processes follow the agent's orders and otherwise act at random; violations are detected."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.agent = Agent()
        self.preloader = True  # it exists, ready or not
        self.asked: list[WorkerId] = []  # waiting to be forked
        self.alive: dict[WorkerId, int] = {}  # processes -> local rank
        self.prepared: dict[WorkerId, int] = {}
        self.doomed: set[WorkerId] = set()  # SIGKILL has been sent
        # Killing them is allowed: by order, for their behaviour, or because of the node.
        self.unwanted: set[WorkerId] = set()
        self.replaced: set[WorkerId] = set()  # by order of the coordinator
        self.reported: Counter[WorkerId] = Counter()
        self.next: Counter[int] = Counter()  # rank -> its next incarnation

    def happens(self, event: a.Event, after_s: float = 0.0) -> None:
        for instruction in self.agent(event, after_s):
            self.carry_out(instruction)

    def carry_out(self, do: a.Instruction) -> None:
        if isinstance(do, a.PrepareWorker):
            self.prepared[do.worker] = do.local_rank
        elif isinstance(do, a.DropWorker):
            assert do.worker not in self.alive
            del self.prepared[do.worker]
        elif isinstance(do, a.ForkWorker):
            assert self.preloader
            self.asked.append(do.worker)
        elif isinstance(do, a.KillWorker | a.KillHung):
            assert do.worker in self.alive, f"{do} kills a process that is not there"
            assert do.worker in self.unwanted, f"{do} kills a worker that is wanted"
            self.doomed.add(do.worker)
        elif isinstance(do, a.TerminateWorker):
            assert do.worker in self.unwanted
        elif isinstance(do, a.ReportDeath):
            self.reported[do.worker] += 1
            assert self.reported[do.worker] == 1
        elif isinstance(do, a.StartPreloader):
            assert not self.preloader
            self.preloader = True
        elif isinstance(do, a.JoinAgain):
            assert not self.alive
            assert not self.prepared

    def forks(self, worker: WorkerId) -> None:
        slot = self.prepared[worker]
        assert slot not in self.alive.values(), f"{worker} is forked into slot {slot}, where another one runs"
        self.alive[worker] = slot
        self.happens(a.WorkerForked(worker))

    def dies(self, worker: WorkerId) -> None:
        del self.alive[worker]
        del self.prepared[worker]
        self.happens(a.WorkerGone(worker))

    def all_unwanted(self) -> None:
        self.unwanted |= self.prepared.keys()

    def anything(self) -> None:
        """One of the possible events occurs."""
        rng = self.rng
        choices = [self.coordinator, self.coordinator, self.processes, self.processes, self.processes, self.preloads]
        choices += [self.time, self.user] if rng.random() < 0.2 else [self.time]
        rng.choice(choices)()

    def coordinator(self) -> None:
        """The coordinator acts on what was reported to it, within its rules."""
        rng, phase = self.rng, self.agent.state.phase
        if phase in (P.JOINING, P.REJOINING):
            self.happens(a.Welcomed())
        elif phase is P.CHECKING:
            self.happens(a.HealthChecked("hot" if rng.random() < 0.1 else ""))
        elif phase in agent.RUNS:
            self.order()

    def order(self) -> None:
        rng, state = self.rng, self.agent.state
        wanted = [worker for worker in self.prepared if worker not in self.replaced and not self.reported[worker]]
        kind = rng.random()
        if kind < 0.5 and len(wanted) < CONFIG.slots:
            ranks = [rank for rank in range(4) if rank not in {worker.rank for worker in wanted}]
            ranks = rng.sample(ranks, rng.randint(1, CONFIG.slots - len(wanted)))
            workers = tuple(w(rank, self.next[rank]) for rank in ranks)
            self.next.update(ranks)
            self.happens(a.StartOrdered(workers))
        elif kind < 0.8 and wanted:
            killed = tuple(rng.sample(wanted, rng.randint(1, len(wanted))))
            if state.phase is P.SERVING:
                self.unwanted.update(killed)
                self.replaced.update(killed)
            self.happens(a.KillOrdered((*killed, w(9, 9))))
        elif kind < 0.86:
            self.all_unwanted()
            self.happens(a.FenceOrdered("silent"))
        elif kind < 0.88:
            self.all_unwanted()
            self.happens(
                a.EndOrdered(rng.choice((FAILED, a.NodeOutcome(True), a.NodeOutcome(True, "it left", left=True))))
            )

    def processes(self) -> None:
        rng = self.rng
        if self.asked and rng.random() < 0.5:
            self.forks(self.asked.pop(0))
        elif self.alive:
            worker = rng.choice(list(self.alive))
            kind = rng.random()
            if worker in self.doomed or kind < 0.2:
                self.dies(worker)
            elif kind < 0.4:
                self.happens(a.WorkerSpoke(worker))
            elif kind < 0.6 and not self.reported[worker]:
                self.unwanted.add(worker)
                self.happens(a.MainThreadFailed(worker))
            elif kind < 0.8:
                self.unwanted.add(worker)
                self.happens(a.WorkerHung(worker, stopped=rng.random() < 0.2, stacks=rng.random() < 0.2))
            elif kind < 0.9:
                self.unwanted.add(worker)
                self.happens(a.WorkerDefied(worker, "it does not listen"))

    def preloads(self) -> None:
        if self.preloader and not self.agent.state.preloaded:
            self.happens(a.PreloaderReady())
        elif self.preloader and self.rng.random() < 0.2:
            self.preloader = False
            self.asked.clear()
            self.happens(a.PreloaderLost())

    def time(self) -> None:
        unheard_s = self.rng.choice((0.0, 0.0, 5.0))
        if unheard_s and self.agent.state.alone_s and self.agent.now + 40 - self.agent.state.alone_s > 300:
            self.all_unwanted()
        if self.agent.state.phase is P.ENDING:
            self.all_unwanted()
        self.happens(a.TimePassed(unheard_s), after_s=self.rng.choice((0.1, 1.0, 40.0)))

    def user(self) -> None:
        if self.agent.state.stop_why:
            self.all_unwanted()
        ask = self.rng.choice((a.StopAsked, a.LeaveAsked, a.PreemptionNoticed))
        self.happens(ask("asked to"))

    def comes_to_its_end(self) -> None:
        """The job is over, and all processes follow orders: the node ends with nothing left."""
        self.all_unwanted()
        self.happens(a.EndOrdered(FAILED))
        self.happens(a.TimePassed(), after_s=31.0)
        while self.asked:
            self.forks(self.asked.pop(0))
        assert self.alive.keys() <= self.doomed, "a worker is not killed though the job is over"
        for worker in list(self.alive):
            self.dies(worker)
        assert self.agent.state.phase is P.ENDED
        assert not self.prepared


def test_no_order_of_events_does_harm() -> None:
    phases: Counter[P] = Counter()
    stages: Counter[WorkerStage] = Counter()
    for seed in range(400):
        machine = Machine(seed)
        try:
            for _ in range(120):
                machine.anything()
                phases[machine.agent.state.phase] += 1
                stages.update(worker.stage for worker in machine.agent.state.workers.values())
            machine.comes_to_its_end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}; {', '.join(machine.agent.state.story)}") from error
    assert phases.keys() == set(P), phases
    assert min(phases.values()) > 50, phases
    assert stages.keys() == set(WorkerStage), stages


def test_a_fenced_node_comes_back_whatever_it_was_at() -> None:
    for seed in range(200):
        machine = Machine(seed)
        while machine.agent.state.phase is not P.SERVING:
            machine.anything()
            if machine.agent.state.outcome is not None:
                break
        for _ in range(20):
            if machine.agent.state.phase is P.SERVING:
                machine.anything()
        if machine.agent.state.phase is not P.SERVING or machine.agent.state.stop_why:
            continue
        machine.all_unwanted()
        machine.happens(a.FenceOrdered("silent"))
        while machine.asked:
            machine.forks(machine.asked.pop(0))
        for worker in list(machine.alive):
            machine.dies(worker)
        assert machine.agent.state.phase is P.REJOINING, f"seed {seed}"
