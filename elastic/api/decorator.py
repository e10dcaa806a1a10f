"""`@elastic`: from an ordinary training function to a worker of an elastic job."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, Unpack

import numpy as np
import torch

from everstep.comms.base.process import keep_freed_memory
from everstep.elastic.contract.collectives import (
    INSTEAD,
    CollectiveWatch,
    group,
    raised_there,
)
from everstep.elastic.contract.errors import JobEnded, UsageError, shortened
from everstep.elastic.contract.faults import Fault
from everstep.elastic.contract.membership import AgentMembership, Membership, Solo
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.script_end import at_end
from everstep.elastic.contract.settings import (
    SETTINGS,
    Arguments,
    Settings,
    WorkerContext,
    declared,
    resolve,
    threads,
)
from everstep.elastic.contract.signals import leave_to_launcher
from everstep.elastic.contract.timed import TimedMesh
from everstep.elastic.protocol import events as e

from .run import Run

P = ParamSpec("P")


def elastic(**arguments: Unpack[Arguments]) -> Callable[[Callable[Concatenate[Run, P], Any]], Callable[P, None]]:
    """Make `train(run, ...)` a job that survives lost workers: `@elastic(steps=..., ...)`.

    `steps`: optimizer steps in all. `global_batch_size`: samples a step; `micro_batch_size`: samples a forward, by
    which it must be divisible. `stages`: pipeline stages. `seed`: of the data order, dropout and initialisation.
    `skip_bad_samples`: how many samples may raise when a rank reads them; the next one takes the place of each.
    `master_dtype`: the type in which the optimizer steps bfloat16 and float16 parameters, "float32", or "none": theirs.
    `loss_reduction`: what the loss of a micro-batch is: a "mean", a "sum", or a sum over "tokens" that are counted.

    `protection`: how the state survives lost nodes: "parity" (erasure code), "replicate" (copies), "replay" (a backup
    that gets the reduced gradients and runs the same optimizer), "none". `node_losses`: how many nodes may be lost at
    once. `snapshot_every`: steps between the versions that survive node losses, or "auto": as often as
    `snapshot_budget` (a share of the step's time) allows. `on_loss`: what to do when more is lost: "checkpoint",
    "neighbors" (lossy), "stop".
    `verify_every`: steps between comparisons of the replicas of each parameter, 0 for never; `on_corruption`: the
    reaction to a replica that differs, "repair" or "evict". `repeat_every`: steps between those in which each rank
    computes its first micro-batch twice, and warns if the gradients differ, 0 for never.

    `checkpoint`: the URL of a folder (any fsspec file system, whose options are `checkpoint_options`) in which a
    checkpoint is saved every `checkpoint_every` steps, and after the last step; at least `checkpoint_keep` are kept,
    and each for `checkpoint_keep_s` seconds. A save is abandoned after `checkpoint_timeout` seconds without progress.
    `resume`: "auto", resume from the newest one there; "never"; or the URL of one to start from if there is none yet.
    `resume_hyperparameters`: whether rates and the other settings of the optimizer are the "checkpoint"'s or the
    "script"'s. `on_damage`: a damaged checkpoint is skipped in favour of the previous one, "older", or ends the job,
    "stop". `resume_data`: a checkpoint trained with another dataset, other batch sizes or another seed is refused,
    "check", or continued, "ignore".

    Call the decorated function without `run`. Under `everstep run` it is one worker of the job; started by itself it
    runs alone. An invalid setting ends the script with a one-line error instead of a traceback.
    """

    SIGNATURE.bind(**arguments)

    def decorate(function: Callable[Concatenate[Run, P], Any]) -> Callable[P, None]:
        @functools.wraps(function)
        def main(*args: P.args, **kwargs: P.kwargs) -> None:
            with _training(function.__name__, arguments) as run:
                function(run, *args, **kwargs)

        return main

    return decorate


def join(**arguments: Unpack[Arguments]) -> Run:
    """Make the rest of this script a job that survives lost workers: `run = everstep.join(steps=..., ...)`.

    For a script that trains at module level; the arguments are those of `everstep.elastic`. Call it once, before the
    model is built: it seeds the generators. Training ends when the script does: by its last line, by `sys.exit(0)`, or
    with an error, as the function of the decorator would.
    """
    SIGNATURE.bind(**arguments)
    script = contextlib.ExitStack()
    run = script.enter_context(_training("the script", arguments))
    _joined.append("the script")

    def end(error: BaseException | None) -> None:
        script.__exit__(type(error) if error is not None else None, error, error.__traceback__ if error else None)

    at_end(end)
    return run


@contextlib.contextmanager
def _training(name: str, arguments: Arguments) -> Iterator[Run]:
    """The training of this process: the body is the user's code. A `SystemExit` of status 0 in it is a good end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(
            f"everstep: error: {name} trains again in a process that it has started by 'spawn' or 'forkserver', which "
            'imports the script: put the training under if __name__ == "__main__":'
        )
    context = WorkerContext.from_environment()
    if _joined:
        raise UsageError(f"{name}: everstep.join has made this script a training already, and a job is one training")
    if context is not None and _trained:
        _refuse_second(name)
    membership = _membership(context)
    membership.declare()
    if context is not None:
        leave_to_launcher()
        _watch_collectives(membership)
    with _reported(membership, context):
        settings = resolve(declared(arguments))
        with _run(settings, context, membership) as run:
            ending: SystemExit | None = None
            try:
                yield run
            except SystemExit as error:
                if error.code:
                    raise
                ending = error
            if run.layout is None:
                how = "ended" if ending or _joined else "returned"
                raise UsageError(
                    f"{name} {how} without calling run.prepare(...) or run.steps(...): nothing was trained"
                )
            run._finish()
            _ended_well(name, membership)
    if ending is not None:
        raise ending


SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(
            known.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if known.argument is MISSING else known.argument,
            annotation=Arguments.__annotations__[known.name],
        )
        for known in SETTINGS
    ]
)
elastic.__signature__ = SIGNATURE  # type: ignore[attr-defined]  # what help() and editors show


LOST = 3  # exit status of a script that runs alone and could not save its last checkpoint

_trained: list[tuple[str, Membership]] = []  # the training of this process, once it is over
_joined: list[str] = []  # the training that `join` has begun, to the end of the script
_unsaved: list[str] = []  # losses of a script without the launcher


def _ended_well(name: str, membership: Membership) -> None:
    _trained.append((name, membership))
    if isinstance(membership, Solo) and membership.lost:
        _unsaved.append(membership.lost)


def _refuse_second(name: str) -> NoReturn:
    """Refuse a second training: the other ranks, their keepers and the coordinator have state for only one."""
    first, membership = _trained[0]
    why = f"{name}: this script has trained already ({first}), and a job is one training: start another job for it"
    _raise_in_job(membership, why, "")


@atexit.register
def _end_with_loss() -> None:
    """At exit of a script whose last state was not saved: the loss was reported, so only set the exit status."""
    if _unsaved and getattr(sys, "last_value", None) is None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        logging.shutdown()
        os._exit(LOST)


@contextlib.contextmanager
def _run(settings: Settings, context: WorkerContext | None, membership: Membership) -> Iterator[Run]:
    rank = context.rank if context else 0
    incarnation = context.incarnation if context else 0
    faults = Fault.parse(os.environ.get(Fault.VARIABLE, ""))
    progress = Progress(context.progress_fd if context else None, rank, incarnation, faults)

    def corrupted(generation: int, source: int, what: str) -> None:
        membership.tell(e.CorruptionFound(membership.worker, generation, "frame", rank=source, detail=what))

    comm = TimedMesh(
        progress,
        rank,
        incarnation,
        host=context.host if context else "127.0.0.1",
        host_id=context.host_id if context else uuid.uuid4().hex,
        token=context.token if context else uuid.uuid4().hex,
        shared_memory=context.shared_memory if context else True,
        on_corruption=corrupted,
    )
    seed_everything(settings.seed)
    torch.set_num_threads(threads())
    keep_freed_memory()
    run = Run(settings, context, comm, comm.peer, membership, progress)
    try:
        yield run
    finally:
        run.release()
        run.ends.close()
        comm.close()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, so that every rank builds the same model."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _reported(membership: Membership, context: WorkerContext | None) -> Iterator[None]:
    """Map the way the user's function ends to the job's end."""
    try:
        yield
    except JobEnded:
        sys.exit(1)
    except UsageError as error:
        if context is None:
            sys.exit(f"everstep: error: {error}")
        _raise_in_job(membership, str(error), "")
    except (SystemExit, KeyboardInterrupt, Exception) as error:
        if context is None:
            raise
        _record_for_torch(error)
        hint = f" ({INSTEAD})" if membership.changed and raised_there(error) else ""
        trace = "".join(traceback.format_exception(error.with_traceback(_users_part(error.__traceback__))))
        _raise_in_job(membership, f"{type(error).__name__}: {error}{hint}", f"{trace}{hint and INSTEAD + chr(10)}")


def _membership(context: WorkerContext | None) -> Membership:
    if context is None:
        return Solo()
    return AgentMembership(context.control_fd, e.WorkerId(context.rank, context.incarnation))


def _watch_collectives(membership: Membership) -> None:
    def warned(text: str) -> None:
        warn(membership, Notice.COLLECTIVE, text)

    def given_up(text: str) -> None:
        membership.tell(e.WorkerRaised(membership.worker, text, ""))

    CollectiveWatch(warned, given_up).start(lambda: membership.changed and group() is membership.lost_group)


def _raise_in_job(membership: Membership, message: str, trace: str) -> NoReturn:
    membership.tell(e.WorkerRaised(membership.worker, shortened(message), shortened(trace)))
    while not membership.interrupted():
        time.sleep(0.02)
    os._exit(1)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame that is not this module's on."""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _record_for_torch(error: BaseException) -> None:
    """Write the error file that torch's elastic tools read (TORCHELASTIC_ERROR_FILE)."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)
