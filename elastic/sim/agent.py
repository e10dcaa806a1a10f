"""A simulated node's agent: the product's machine, whose instructions act on simulated processes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from everstep.elastic.protocol import agent
from everstep.elastic.protocol import agent_events as a
from everstep.elastic.protocol import events as e

from .world import World

TICK_S = 0.1
GONE_S = (0.0005, 0.05)  # how long the kernel takes to end a process
EARLY = 0.3  # probability that a worker's main thread is seen to end before its process
PATIENCE_S = (1.0, 4.0, 300.0)  # how long a node without coordinator and progress continues


class Machinery(Protocol):
    """What an agent acts on."""

    def announce(self, one: SimAgent) -> None:
        """The node joins the job, if the coordinator accepts it."""

    def fork(self, worker: e.WorkerId, node: str) -> None:
        """Create a worker's process."""

    def end(self, worker: e.WorkerId, why: str) -> bool:
        """End a worker's process. False if it has ended already."""

    def ends_job(self, worker: e.WorkerId) -> None:
        """Notify a worker that the job is over."""

    def report_death(self, worker: e.WorkerId) -> None:
        """Report to the coordinator how a worker ended."""

    def lose_keeper(self, node: str, why: str) -> None:
        """End the node's keeper and its stream: the node leaves the job."""

    def connect_again(self, one: SimAgent, former: str) -> None:
        """The agent contacts the coordinator under its new name, as soon as the node is not silent."""

    def asks_drain(self, node: str, why: str) -> None:
        """Ask the coordinator to let the node leave."""

    def sees(self, node: str) -> a.TimePassed:
        """The event `TimePassed` with what the agent observes."""


class SimAgent:
    """The agent of one machine, under all its names; `dead` with the machine."""

    def __init__(self, world: World, node: str, slots: int, machinery: Machinery) -> None:
        self._world = world
        self._machinery = machinery
        self.random = random.Random(f"{world.seed} {node}")  # separate, so that older seeds keep their meaning
        config = agent.AgentConfig(node=node, slots=slots, coordinator_wait_s=self.random.choice(PATIENCE_S))
        self.state = agent.new_agent(config)
        self.dead = False
        self._node = node  # its name until it joins under another one
        self._events: deque[a.Event] = deque()
        self._stepping = False
        self._carriers = self._instructions()
        self.happened(a.PreloaderReady())
        world.after(TICK_S, self._tick)

    @property
    def ended(self) -> bool:
        return self.dead or self.state.phase is agent.AgentPhase.ENDED

    def happened(self, event: a.Event) -> None:
        """Pass an event to the machine, and carry out its instructions."""
        self._events.append(event)
        if self._stepping:
            return  # the event arose during an instruction: it is handled next
        self._stepping = True
        while self._events and not self.dead:
            self.state, instructions = agent.step(self.state, self._events.popleft(), self._world.now)
            if found := agent.violations(self.state):
                happened = ", ".join(self.state.story)
                raise AssertionError(f"{self.state.node}: {'; '.join(found)}; what happened: {happened}")
            for instruction in instructions:
                self._carriers[type(instruction)](instruction)
        self._stepping = False

    def _tick(self) -> None:
        if not self.ended:
            self.happened(self._machinery.sees(self._node))
            self._world.after(TICK_S, self._tick)

    def died(self, worker: e.WorkerId) -> None:
        """The death of a worker that was not ordered to end is seen: at once, or of its main thread first."""
        if self.random.random() < EARLY and worker in self.state.workers:
            self.happened(a.MainThreadFailed(worker))
            self._gone_soon(worker, 0.3)
        else:
            self.gone(worker)

    def gone(self, worker: e.WorkerId) -> None:
        if worker in self.state.workers:
            self.happened(a.WorkerGone(worker))

    def _gone_soon(self, worker: e.WorkerId, within_s: float) -> None:
        self._world.after(self.random.uniform(GONE_S[0], within_s), lambda: self.gone(worker))

    def _end(self, worker: e.WorkerId, why: str) -> None:
        if self._machinery.end(worker, why):
            self._gone_soon(worker, GONE_S[1])

    def _fork(self, worker: e.WorkerId) -> None:
        self._machinery.fork(worker, self.state.node)
        self.happened(a.WorkerForked(worker))

    def _join_again(self, do: a.JoinAgain) -> None:
        former, self._node = self._node, do.node
        self._machinery.connect_again(self, former)

    def _instructions(self) -> dict[type[Any], Callable[[Any], None]]:
        machinery = self._machinery
        return {
            a.CheckHealth: lambda do: self.happened(a.HealthChecked()),
            a.Announce: lambda do: machinery.announce(self),
            a.EndKeeper: lambda do: machinery.lose_keeper(self._node, "its node is fenced"),
            a.PrepareWorker: _nothing,
            a.DropWorker: _nothing,
            a.ForkWorker: lambda do: self._fork(do.worker),
            a.TerminateWorker: lambda do: None if do.stopping else self._end(do.worker, "the job restarts"),
            a.KillWorker: lambda do: self._end(do.worker, do.why),
            a.ReportDeath: lambda do: machinery.report_death(do.worker),
            a.ForgetFailures: _nothing,
            a.TellEnded: lambda do: machinery.ends_job(do.worker),
            a.JoinAgain: self._join_again,
            a.AskDrain: lambda do: machinery.asks_drain(self._node, do.why),
            a.AskStop: _nothing,
            a.Say: _nothing,
        }


def _nothing(do: a.Instruction) -> None:
    """An instruction that has no counterpart in the simulator."""
