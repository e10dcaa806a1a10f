"""`Run`: the interface of a training script to the runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from everstep.comms.mesh.communicator import Communicator, Peer
from everstep.elastic.contract.digest import state_digest
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import AUTO_STAGES, Settings, WorkerContext
from everstep.elastic.contract.signals import saved_on_signals
from everstep.elastic.contract.stateful import check_size, encode, outline
from everstep.elastic.engine.engine import STATE, Engine
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.engine.resume import Resumption
from everstep.elastic.engine.user_loop import Step
from everstep.elastic.holding.buffer_rules import Rule, check_synced
from everstep.elastic.holding.several_optimizers import AnyOptimizer, parts_of
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer, check_optimizer, is_elementwise
from everstep.elastic.holding.whole_state import complete_model, complete_optimizer
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.devices import make_current, memory_for_state, own_device
from everstep.elastic.step.evaluation_data import EvaluationData
from everstep.elastic.step.gradients import GradientWatch
from everstep.elastic.step.loss_scale import LossScale
from everstep.elastic.step.reduction import Reduction
from everstep.elastic.step.stream_states import StreamStates
from everstep.elastic.step.streams import StreamPlace
from everstep.elastic.step.taking_turns import ONE_EACH, TakingTurns
from everstep.resharding.layout import Layout

from .average import MovingAverage
from .calls import Calls
from .compose import engine_of, job_of
from .course import Course
from .epochs import Epochs
from .evaluation import Evaluation
from .full_state import FullState
from .gathering import with_embeddings
from .gradients import Gradients
from .interruptible import Interruptible
from .loop import Batches, ElasticOptimizer, Turns
from .loop_scaler import LoopScaler
from .other_loaders import OtherLoaders
from .replacement import begin_as_others, note_variables
from .schedulers import Schedulers, checked
from .sharing import SharedState, Sharing
from .updates import Updates, as_one, check_several, taking_turns

Models = TypeVar("Models", bound=nn.Module | Sequence[nn.Module])
Optimizers = TypeVar("Optimizers", bound=Optimizer | Sequence[Optimizer])
Loss = Callable[[Any, Any], Any]  # (output, targets) -> a tensor, or (a tensor, the number of tokens)


class Run(Sharing, Gradients):
    """One worker's part in an elastic training job. Made by the `elastic` decorator, passed to the user's function."""

    def __init__(
        self,
        settings: Settings,
        context: WorkerContext | None,
        comm: Communicator,
        peer: Peer,
        membership: Membership,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self._context = context
        self._comm = comm
        self._peer = peer
        self._membership = membership
        self._progress = progress
        self._engine: Engine | None = None
        self._recovery: Recovery | None = None
        self._parts: Interruptible | None = None
        self._calls: Calls | None = None
        self.state = SharedState()
        self.stream_state = StreamStates()
        self._stream_place = StreamPlace(progress)
        self._registered: dict[str, Any] = {STATE: self.state}
        self._batches: Batches | None = None
        self._average: MovingAverage | None = None
        self._gradients: GradientWatch | None = None
        self._schedulers: Schedulers | None = None
        self._step_functions: list[Callable[[Step], None]] = []
        self.ends = contextlib.ExitStack()  # undone when this run ends

    # ------------------------------------------------------------ where we are

    @property
    def layout(self) -> Layout | None:
        """The layout in force; None before `prepare` or `steps`."""
        return self._engine.layout if self._engine else None

    @property
    def rank(self) -> int:
        """This worker's place among the live ones, 0 to world_size - 1. Changes when the generation does."""
        if self.layout is None:
            return self._comm.rank
        return self.layout.ranks.index(self._comm.rank)

    @property
    def world_size(self) -> int:
        """How many workers train now."""
        if self.layout is None:
            return self._context.world_size if self._context else 1
        return len(self.layout.ranks)

    @property
    def generation(self) -> int:
        """How often the membership has changed, counted from 1."""
        return self.layout.generation if self.layout else 0

    @property
    def step(self) -> int:
        """How many steps are committed.

        Before a loop over prepared batches begins on a replacement: how many of them the script has seen on others. So
        a script that remembers this number there notices the step that was committed while it joined.
        """
        engine = self._engine
        if engine is None:
            return 0
        return engine.user_loop.seen(engine.version, loops=engine.loops)

    @property
    def stream_index(self) -> int:
        """Which stream the dataset is to give, in the `__iter__` of an IterableDataset that divides itself.

        There are `stream_count` streams: one for each micro-batch of a step. Whichever ranks there are, step t takes
        the next micro-batch of each. A dataset that does not read this is divided by the runtime.
        """
        return self._stream_place.index

    @property
    def stream_count(self) -> int:
        """How many streams there are; see `stream_index`."""
        return self._stream_place.count

    @property
    def is_replacement(self) -> bool:
        """Whether training had begun before this worker started: check it before one-time actions."""
        return self._context is not None and self._context.begun is not None

    @property
    def device(self) -> torch.device:
        """The device for this worker's model: its GPU, by its local rank, if there is one, else the CPU.

        It becomes torch's current device. Raises UsageError if there are more workers than GPUs on the node.
        """
        return own_device(self._context)

    # ------------------------------------------------------------ training

    def prepare(
        self,
        model: Models,
        optimizer: Optimizers,
        dataset: Any,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        scheduler_every: Literal["step", "epoch"] = "step",
        skip_nonfinite: bool = False,
        scaler: GradScaler | None = None,
        accumulation: int = 1,
        buffers: Mapping[str, Rule] | None = None,
        sparse_gradients: Literal["refuse", "dense"] = "refuse",
        updates: Literal["alternating", "simultaneous"] = "alternating",
        every: Sequence[int] | None = None,
        embedding_size: int | None = None,
    ) -> tuple[Models, Optimizers, Batches]:
        """Make an ordinary loop elastic: returns the model, an optimizer and an iterable of this rank's micro-batches.

        Each pass of the loop does one micro-batch: forward, `loss.backward()`, `optimizer.step()`, which acts when the
        step's micro-batches are done. A scheduler built on the optimizer, passed in or found, is stepped by the
        runtime once per step; its own `step()` in the loop then does nothing. With `scheduler_every="epoch"` the script
        steps its schedulers, behind the batches of an epoch of `run.epochs`. With `skip_nonfinite` a step whose
        gradient is not finite changes nothing. `scaler` scales the losses: its `step` and `update` stay in the loop,
        and the runtime changes its scale once per step. `accumulation=k` is for a loop that divides each loss by `k`,
        and calls `optimizer.step()` in every k-th turn. `buffers`: how the step's micro-batches combine in buffers that
        forwards change, by name or pattern: "mean", "sum", "max" or "last". `sparse_gradients`: whether a sparse
        gradient, as of `nn.Embedding(sparse=True)`, ends the job ("refuse") or is made "dense". Supports one pipeline
        stage; `steps` any number.

        Models and optimizers may be lists, each of any length, for a loop that calls each `step()` once. `updates`:
        whether the optimizers take turns on each batch, one step of the job after the other, as in a plain loop (a turn
        then takes the gradients of one of them, so each batch is handed out once for each), or step together.
        `every`: for each optimizer, in every how many batches it steps, such as [5, 1] where the second makes five
        steps for each of the first; see `run.is_due`. `embedding_size`: the numbers of a sample that `run.gather_batch`
        takes, for a loss over the global batch; each batch is handed out twice then.
        """
        if self.settings.stages > 1:
            raise UsageError(
                f"run.prepare drives one stage, and the job has stages={self.settings.stages}: use run.steps(...)"
            )
        if scheduler_every not in ("step", "epoch"):
            raise UsageError(f"scheduler_every must be 'step' or 'epoch', got {scheduler_every!r}")
        by_epoch = scheduler_every == "epoch"
        if by_epoch and not self.settings.epochs:
            raise UsageError("scheduler_every='epoch' is for a job with epochs=, whose loop is over run.epochs()")
        models, joined = as_one(model, optimizer, updates)
        embeddings = None
        if embedding_size is not None:
            models, joined, embeddings = with_embeddings(models, joined, self.settings, embedding_size, updates)
        optimizers = parts_of(joined)
        turns = taking_turns(optimizers, updates, every)
        if len(optimizers) > 1:
            what = "several optimizers" if embeddings is None else f"embedding_size={embedding_size}"
            check_several(self.settings, turns, accumulation, what=what)
        scale = LossScale(scaler)
        reduction = Reduction(
            self.settings,
            scale,
            self._membership,
            skip_nonfinite=skip_nonfinite,
            accumulation=accumulation,
            sparse_gradients=sparse_gradients,
        )
        engine = self._set_up(
            *(models, joined, dataset, collate_fn, _no_loss, scheduler, reduction, buffers),
            loops=True,
            by_epoch=by_epoch,
            turns=turns,
        )
        assert self._gradients is not None
        assert self._schedulers is not None
        scales = LoopScaler(scale.scaler) if scale.scaler is not None else None
        taken = Updates(engine.stack, optimizers, self._gradients, engine.data.order.due if turns.alternates else None)
        of_turn = Turns(
            self._gradients, self._schedulers, scales, taken, accumulates=accumulation > 1, embeddings=embeddings
        )
        others = OtherLoaders(self._membership)
        self.ends.enter_context(others.watch())
        batches = self._batches = Batches(engine, of_turn, *self._course(), others)
        for one in [model] if isinstance(model, nn.Module) else model:
            if "module" not in one.__dict__ and "module" not in one._modules:
                one.__dict__["module"] = one  # scripts for DDP write model.module; not a submodule of itself
        prepared = [ElasticOptimizer(one, batches, taken, number) for number, one in enumerate(optimizers)]
        self._schedulers.add_optimizers(prepared)
        prepared = prepared[embeddings is not None :]  # the user's
        if scales is not None:
            scales.serve(prepared)
        found: Any = prepared[0] if isinstance(optimizer, Optimizer) else prepared
        return model, found, batches

    def steps(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataset: Any,
        *,
        loss_fn: Loss,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        scheduler: LRScheduler | None = None,
        clip_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        scaler: GradScaler | None = None,
        buffers: Mapping[str, Rule] | None = None,
        sparse_gradients: Literal["refuse", "dense"] = "refuse",
    ) -> Iterator[Step]:
        """Train, and yield every step once it is committed, on every rank.

        `loss_fn(output, targets)` gives a micro-batch's loss, a mean or a sum as `loss_reduction` says, or with
        "tokens" (sum, number of tokens); the dataset yields (inputs, targets). `clip_grad_norm` is the largest global
        gradient norm; `scheduler` is stepped after each step. With `skip_nonfinite` a step whose gradient is not finite
        changes nothing. `scaler` scales the losses; the runtime changes its scale once per step. `buffers` and
        `sparse_gradients` as in `prepare`.
        """
        reduction = Reduction(
            self.settings,
            LossScale(scaler),
            self._membership,
            skip_nonfinite=skip_nonfinite,
            accumulation=1,
            sparse_gradients=sparse_gradients,
        )
        engine = self._set_up(
            model, optimizer, dataset, collate_fn, loss_fn, scheduler, reduction, buffers, loops=False
        )
        if clip_grad_norm is not None:
            engine.adjustments.clip["norm"] = float(clip_grad_norm)
        return self._run(engine, *self._course())

    def epochs(self, count: int | None = None) -> Epochs:
        """The epochs of a job with `epochs=`, to loop over; the loop over the prepared batches ends with each.

        A replacement and a job that resumes begin with the epoch in which the job is. `count`, if given, must be that
        of the job. For a loop over `prepare`'s batches; with `steps`, `run.epoch` says which epoch a step is of.
        """
        engine = self._trained()
        if self._batches is None:
            raise UsageError(
                "run.epochs() is for a loop over run.prepare's batches; run.steps(...) with epochs= in the decorator "
                "yields the steps of all epochs, and run.epoch is the epoch of a step"
            )
        if not self.settings.epochs:
            raise UsageError(
                f"run.epochs() was called in a job of steps={self.settings.steps}: give the decorator epochs= in its "
                "place"
            )
        if count not in (None, self.settings.epochs):
            raise UsageError(
                f"run.epochs({count}): the job has epochs={self.settings.epochs} (from the decorator, --es-epochs or "
                "EVERSTEP_EPOCHS): call run.epochs()"
            )
        return Epochs(engine, self._parts_of_run(), self._batches.course, self.settings.epochs)

    @property
    def epoch(self) -> int:
        """The epoch that the script is in, counted from 0: in run.epochs its own, else that of the present step."""
        engine = self._engine
        if engine is None:
            return 0
        if self._batches is not None and self._batches.course.epoch is not None:
            return self._batches.course.epoch
        loop = engine.user_loop
        step = loop.turn.index if loop.turn is not None else engine.version - len(loop.unseen)
        return engine.data.order.epoch_of(step)

    def _run(self, engine: Engine, parts: Interruptible, course: Course) -> Iterator[Step]:
        with parts.refusing():
            parts.check()
            yield from self._steps(engine, parts, course)

    def _steps(self, engine: Engine, parts: Interruptible, course: Course) -> Iterator[Step]:
        course.begin()
        try:
            while True:
                while engine.user_loop.unseen:
                    yield course.show()
                course.pass_by()
                if engine.switch is not None:
                    course.go_on()
                    parts.switch()
                elif course.stops():
                    return
                elif engine.ended():
                    parts.do(engine.conclude)
                    if engine.ended() and engine.switch is None and not engine.user_loop.unseen:
                        course.end()
                        return
                else:
                    course.go_on()
                    parts.do(engine.run_step)
        except GeneratorExit:
            engine.leave_loop()
            course.end()
            raise

    def on_step(self, function: Callable[[Step], None]) -> Callable[[Step], None]:
        """Call `function` with every step that is committed, once, on every rank; usable as a decorator.

        It is called between two turns of the loop: for `run.steps`, before the loop's body has the step. A replacement
        calls it for the steps from which it takes part on.
        """
        if not callable(function):
            raise UsageError(f"run.on_step(function): it is called with every step, got {function!r}")
        self._step_functions.append(function)
        return function

    def stop(self, why: str = "") -> None:
        """End training after the step that is under way: on every rank after the same one, whichever rank asks.

        The loop ends there as by `break`; the code after it runs, and the last state is saved where checkpoints are.
        Call it on all ranks, or decide by what all of them have, such as a step's loss: the request of a rank that is
        lost before the step is agreed on is lost with it.
        """
        if not isinstance(why, str):
            raise UsageError(f"run.stop(why): the reason is a text, got {why!r}")
        engine = self._trained()
        engine.stop_request.ask(engine.version, why or "run.stop()")

    def average(self, model: nn.Module, decay: float) -> MovingAverage:
        """Keep a moving average of the parameters: after each step `average = decay * average + (1 - decay) * value`.

        Call it before `prepare` or `steps`, with the same model, or with one of several. The averages are kept as the
        optimizer's state is: sharded, protected, saved, restored. `run.evaluate(..., average=True)` evaluates with
        them, and `run.full_state_dict()["average"]` has them by name, and so has the `state_dict()` of what is
        returned.
        """
        if self._engine is not None:
            raise UsageError("run.average(model, decay) has to be called before run.prepare or run.steps")
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UsageError(f"run.average: decay must be a number from 0 to less than 1, such as 0.999; got {decay!r}")
        self._average = MovingAverage(model, float(decay), self.full_state_dict)
        return self._average

    def evaluate(self, data: Any, function: Callable[[Any], Any], *, average: bool = False) -> list[Any]:
        """The results of `function(batch)` for all batches of a dataset or DataLoader, in their order, on every rank.

        A call of all ranks, between steps: the batches are dealt over the live ranks, and each is evaluated once; if a
        rank is lost, what it had is dealt again. Batches are those of the DataLoader (of a dataset: of
        `micro_batch_size` samples), in the order of the dataset, or of the samples that a sampler chooses, in its own.
        The model is in evaluation mode meanwhile, without gradients; modes and random generators are left as they were.
        With several stages each rank has the layers of the others meanwhile, so `model(inputs)` works, and has to have
        the memory for the parameters of the whole model. With `average` the parameters have the values of `run.average`
        meanwhile. A result holds numbers, text, lists, tuples, dictionaries, bytes, tensors and arrays.
        """
        engine = self._trained()
        if average and self._average is None:
            raise UsageError("run.evaluate(average=True): call run.average(model, decay) before run.prepare")
        found = EvaluationData(data, self.settings.micro_batch_size, self.settings.seed)
        evaluation = Evaluation(engine, self._parts_of_run(), found, function, self._full_state(), average=average)
        return evaluation.run(self._sharing())

    def heartbeat(self) -> None:
        """Report that this worker is alive, from user code that takes long: restarts its hang timeout.

        For a dataset, an evaluation or other work that may take longer than the limits in docs/guarantees.md. Call it
        from the code that makes the progress, not from a separate thread, which would hide a hang.
        """
        self._progress.tick()

    def register_state(self, name: str, item: Any) -> None:
        """Keep an object with `state_dict()` / `load_state_dict()` in step: on workers that join later, on resuming.

        Its state may hold numbers, text, lists, tuples, dictionaries, bytes, tensors and arrays, and has to change in
        the same way on every rank. Tensors and arrays of at least 16 KiB may have any size: their content lies in
        keepers, and is compared in every step. All the rest must be small (1 MiB in all, smaller tensors as base64),
        since it is agreed on in every step.
        """
        if not callable(getattr(item, "state_dict", None)) or not callable(getattr(item, "load_state_dict", None)):
            raise UsageError(f"register_state({name!r}): a {type(item).__name__} has no state_dict and load_state_dict")
        state = encode(item.state_dict(), f"register_state({name!r})", outline)
        if name in self._registered:
            raise UsageError(f"register_state({name!r}): that name is taken")
        others = {known: encode(one.state_dict(), known, outline) for known, one in self._registered.items()}
        check_size({**others, name: state})
        self._registered[name] = item

    # ------------------------------------------------------------ the whole state

    def full_state_dict(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {name: {state: tensor}}} of the whole model, on the calling rank.

        The model's tensors have the types of the live model. Where parameters have float32 masters (`master_dtype`),
        these are there too, as "masters": {name: tensor}, and the optimizer's states are theirs; with `run.average`
        the averages, as "average", in the types of the live model.

        Read from the snapshot keepers, so this is no collective: other ranks need not call it.
        """
        with self._progress.called(), self._progress.waiting("snapshots in keepers, for full_state_dict"):
            return self._full_state().read()

    def _full_state(self) -> FullState:
        engine = self._trained()
        assert self._recovery is not None
        return FullState(engine, self._recovery, self._parts_of_run(), alone=self._context is None)

    def release(self) -> None:
        """End what this run has started in this process besides threads: the worker processes of a DataLoader."""
        if self._engine is not None:
            self._engine.data.close()

    # ------------------------------------------------------------ inside

    def _parts_of_run(self) -> Interruptible:
        assert self._parts is not None
        return self._parts

    def _course(self) -> tuple[Interruptible, Course]:
        parts = self._parts_of_run()
        return parts, Course(self._trained(), parts, self._sharing(), self._step_functions, self._begin)

    def _finish(self) -> None:
        """The user's function is over: help the others until they are there too, and training is over."""
        self._parts_of_run().check()
        if self._batches is not None:
            self._batches.finish()
        self._parts_of_run().finish(self._sharing())

    def _sharing(self) -> Calls:
        self._trained()
        assert self._calls is not None
        return self._calls

    def _trained(self) -> Engine:
        if self._engine is None:
            raise UsageError("call run.prepare(...) or run.steps(...) first")
        return self._engine

    def _set_up(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None,
        loss_fn: Loss,
        scheduler: LRScheduler | Sequence[LRScheduler] | None,
        reduction: Reduction,
        buffers: Mapping[str, Rule] | None,
        *,
        loops: bool,
        by_epoch: bool = False,
        turns: TakingTurns = ONE_EACH,
    ) -> Engine:
        if self._engine is not None:
            raise UsageError(
                "run.prepare or run.steps was called twice, and a run is one training over one loader: several models "
                "and optimizers go into one call, as lists; a loader for evaluation stays as it is, or goes to "
                "run.evaluate; another training is another job"
            )
        settings = self.settings
        if self._context is not None and self._context.begun is not None:
            begin_as_others(self._membership, self._context.begun, optimizer)
        check_optimizer(optimizer, model)
        schedulers = checked(scheduler, by_epoch=by_epoch)
        known = self._context.begun.samples if self._context and self._context.begun else 0
        data = DataSource(dataset, settings, collate_fn, self._membership, self._stream_place, known, turns)
        if settings.epochs:
            settings = self.settings = replace(settings, steps=settings.epochs * data.order.epoch_steps)
        described = data.described()
        stack = LayerStack(model, cut=not loops, whole=not is_elementwise(optimizer), buffers=buffers)
        make_current(stack.device)
        decay, averaged = self._average.train_within(model) if self._average is not None else (None, None)
        stack.check_stages(settings.stages)
        values, context = state_digest(model.state_dict()), self._context
        engine = engine_of(
            context,
            self._comm,
            self._membership,
            self._progress,
            settings=settings,
            stack=stack,
            optimizer=UserOptimizer(optimizer, stack, settings.master_dtype, decay, averaged),
            data=data,
            described=described,
            values=values,
            loss_fn=loss_fn,
            reduction=reduction,
            registered=self._registered,
            stream_states=self.stream_state,
            loops=loops,
        )
        self.state.attach(engine.large.values, model)
        self._schedulers = Schedulers(engine, parts_of(optimizer), schedulers, by_epoch=by_epoch)
        engine.note_birth()
        self._engine = engine
        self._recovery = Recovery(engine)
        self._parts = parts = Interruptible(engine, self._recovery)
        self._calls = Calls(
            engine.comm, engine.calls, engine.progress, lambda: engine.version, parts.interrupted, parts.reach
        )
        resumption = Resumption(settings, stack, engine, described, self._membership)
        saved = resumption.find() if context is None or context.rank == 0 else []
        job = job_of(engine, described, values)
        memory = settings.worker_memory
        if settings.stages == AUTO_STAGES and not memory and context is not None:
            memory = memory_for_state(stack.device, context.memory_bytes, context.gpu_workers)
        self._membership.ready(self._peer, job, saved, memory, self._comm.abort)
        self._gradients = GradientWatch(stack) if loops else None  # before a layer may be frozen
        for part in parts_of(optimizer):
            complete_optimizer(part, stack, self.full_state_dict)
        if context is not None and len(stack.layers) > 1:
            complete_model(stack, self.full_state_dict)
        self._recovery.enter()
        if self.is_replacement:
            note_variables(self._membership, self._registered)
        if context is None and settings.checkpoint:
            self.ends.enter_context(saved_on_signals(engine.stop))
        return engine

    def _begin(self) -> None:
        """The user's loop begins."""
        engine, recovery = self._trained(), self._recovery
        check_synced(engine.stack.model)
        assert recovery is not None
        assert self._schedulers is not None
        if self._schedulers.take_over_late():
            recovery.come_up()
        undone = engine.adjustments.begin()
        if engine.version == 0:
            engine.birth.update(engine.adjustments.terms())
        elif undone and recovery.resumed:
            text = (
                f"the script sets {', '.join(undone[:3])} before its loop, and the job resumes from a checkpoint: the "
                "checkpoint's values are used. To take the script's: --es-resume-hyperparameters=script"
            )
            warn(self._membership, Notice.HYPERPARAMETERS_DIFFER, text)
        self.state.begin(resumed=recovery.resumed or not recovery.guide_begun)
        engine.user_loop.begin()
        engine.large.release()


def _no_loss(output: Any, targets: Any) -> Tensor:
    raise AssertionError("the user's loop computes the loss")
