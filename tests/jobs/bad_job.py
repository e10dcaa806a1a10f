"""Scripts with one mistake each; the first argument selects it."""

import contextlib
import os
import sys

import torch
from torch import nn

import everstep

RANK = int(os.environ.get("RANK", "0"))
SETTINGS = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1}


class Uncuttable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(inputs)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.ones(4), torch.ones(4)


def samples(count=32):
    return [(torch.ones(4) * i, torch.zeros(4)) for i in range(count)]


def stack(width=4):
    return nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_steps(run, model, optimizer=None, dataset=None):
    loss = nn.functional.mse_loss
    for _ in run.steps(model, optimizer or sgd(model), samples() if dataset is None else dataset, loss_fn=loss):
        pass


def batch_size(run):
    raise AssertionError("the settings are refused first")


def layers(run):
    train_steps(run, stack())


def workers(run):
    train_steps(run, stack())


def uncuttable(run):
    train_steps(run, Uncuttable())


def small_dataset(run):
    train_steps(run, stack(), dataset=samples(5))


def iterable(run):
    train_steps(run, stack(), dataset=Stream())


def foreign_parameters(run):
    train_steps(run, stack(), optimizer=sgd(stack()))


def several_models(run):
    train_loop(run, [stack(), stack()], sgd(stack()))


def several_optimizers(run):
    model = stack()
    train_steps(run, model, [sgd(model), sgd(model)])


def two(run, dataset=None):
    models = [stack(), stack()]
    return run.prepare(models, [sgd(model) for model in models], dataset or samples())


def one_of_two_steps(run):
    (first, _), (optimizer, _), batches = two(run)
    for inputs, _ in batches:
        first(inputs).sum().backward()
        optimizer.step()


def average_of_another(run):
    run.average(stack(), 0.9)
    two(run)


def turns_on_a_stream(run):
    two(run, Stream())


def lbfgs(run):
    model = stack()
    train_loop(run, model, torch.optim.LBFGS(model.parameters()))


def optimizer_state(run):
    model = stack()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    train_steps(run, model, optimizer=optimizer)


def nothing(run):
    pass


def prepare_stages(run):
    model = stack()
    run.prepare(model, sgd(model), samples())


def train_loop(run, model, optimizer=None, turn=lambda model, optimizer: None, **named):
    """An ordinary loop; `turn` is done between backward and step."""
    model, optimizer, batches = run.prepare(model, optimizer or sgd(model), samples(), **named)
    for inputs, targets in batches:
        nn.functional.mse_loss(model(inputs), targets).backward()
        turn(model, optimizer)
        optimizer.step()


def caught_in_its_turn(run):
    """A script that leaves out batches that fail: the loop must not hand out the same one for ever."""
    model = stack()
    model, optimizer, batches = run.prepare(model, sgd(model), samples())
    for inputs, targets in batches:
        try:
            nn.functional.mse_loss(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        except Exception as error:
            print("this batch failed:", error)
            continue


def caught_around_the_loop(run):
    with contextlib.suppress(Exception):
        train_loop(run, stack(), turn=lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e-3))


def caught_around_steps(run):
    model = stack()
    with contextlib.suppress(Exception):
        for _ in run.steps(model, sgd(model), samples(), loss_fn=nn.functional.mse_loss):
            model[0].weight.data.mul_(2.0)


def scheduler(run):
    model = stack()
    optimizer = sgd(model)
    left = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train_loop(run, model, optimizer)
    left.step()  # once an epoch, in plain torch


def two_schedulers(run):
    model = stack()
    optimizer = sgd(model)
    first = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    second = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train_loop(run, model, optimizer, lambda *_: (first.step(), second.step()))


def plateau(run):
    model = stack()
    optimizer = sgd(model)
    train_loop(run, model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def plateau_in_loop(run):
    model = stack()
    optimizer = sgd(model)
    left = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    train_loop(run, model, optimizer, lambda *_: left.step(1.0))


def scheduler_without_epochs(run):
    train_loop(run, stack(), scheduler_every="epoch")


def scheduler_every_turn(run):
    train_loop(run, stack(), scheduler_every="turn")


def scheduler_in_batches(run):
    model = stack()
    optimizer = sgd(model)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    model, optimizer, batches = run.prepare(model, optimizer, samples(), scheduler_every="epoch")
    for _ in run.epochs():
        plateau.step(1.0)
        for _ in batches:
            plateau.step(1.0)


class CosineOfAnotherLibrary:
    def step_update(self, number):
        pass


def foreign_scheduler(run):
    train_loop(run, stack(), scheduler=CosineOfAnotherLibrary())


def clipped_by_torch(run):
    train_loop(run, stack(), turn=lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e9))


def scaled_gradient(run):
    train_loop(run, stack(), turn=lambda model, _: setattr(model[0].weight, "grad", model[0].weight.grad * 2))


def clipped_through_data(run):
    train_loop(run, stack(), turn=lambda model, _: model[0].weight.grad.data.clamp_(-1e-3, 1e-3))


def grad_scaler(run):
    model = stack()
    scaler = torch.amp.GradScaler("cpu")
    model, optimizer, batches = run.prepare(model, sgd(model), samples())
    for inputs, targets in batches:
        scaler.scale(nn.functional.mse_loss(model(inputs), targets)).backward()
        scaler.step(optimizer)
        scaler.update()


def loads_optimizer(run):
    train_loop(run, stack(), turn=lambda _, optimizer: optimizer.load_state_dict(optimizer.state_dict()))


def unfrozen(run):
    model = stack()
    model[0].requires_grad_(False)
    train_loop(run, model, turn=lambda model, _: model[0].requires_grad_(True))


def added_group(run):
    model = stack()
    added = {"params": model[0].parameters()}
    train_loop(run, model, sgd(model[2]), lambda _, optimizer: optimizer.add_param_group(added))


def rate_of_each_turn(run):
    train_loop(run, stack(), turn=lambda _, optimizer: optimizer.param_groups[0].update(lr=torch.rand(()).item()))


def rate_of_each_rank(run):
    model = stack()
    optimizer = sgd(model)
    for _ in run.steps(model, optimizer, samples(), loss_fn=nn.functional.mse_loss):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + RANK)


def states_differ(run):
    for step in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        run.state["best"] = 0.5 * RANK + step.index


def call_of_one_rank(run):
    for _ in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        if run.rank == 0:
            run.barrier()


def call_in_a_turn(run):
    train_loop(run, stack(), turn=lambda *_: run.mean(1.0))


def collective_in_a_turn(run):
    run.init_process_group()
    train_loop(run, stack(), turn=lambda *_: torch.distributed.all_reduce(torch.ones(1)))


def synced_in_a_group(run):
    run.init_process_group()
    train_steps(run, nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))


def skips_beside_steps(run):
    for _ in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        run.skip()


def steps_behind_skip(run):
    train_loop(run, stack(), turn=lambda *_: run.skip())


def no_step(run):
    model = stack()
    model, _, batches = run.prepare(model, sgd(model), samples())
    for inputs, targets in batches:
        nn.functional.mse_loss(model(inputs), targets).backward()


def loss_shape(run):
    model = stack()
    for _ in run.steps(model, sgd(model), samples(), loss_fn=lambda output, targets: output):
        pass


def buffer_changes(run):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs):
            self.calls += 1
            return self.layer(inputs)

    train_steps(run, Counting())


class Averaging(nn.Module):
    """Keeps an average of its inputs in an attribute; has a buffer that never changes."""

    def __init__(self, averages=True):
        super().__init__()
        self.layer, self.mean, self.averages = nn.Linear(4, 4), torch.zeros(4), averages
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, inputs):
        if self.averages:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return self.layer(inputs) * self.scale - self.mean


def attribute_changes(run):
    train_steps(run, Averaging())


def buffer_between_steps(run):
    model = Averaging(averages=False)
    for step in run.steps(model, sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        if step.index == 1:
            model.scale.data.mul_(2)


def frozen_teacher(run):
    model = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": nn.Linear(4, 4).requires_grad_(False)})
    _, optimizer, batches = run.prepare(model, sgd(model["student"]), samples())
    for inputs, targets in batches:
        nn.functional.mse_loss(model["student"](inputs), targets + model["teacher"](inputs)).backward()
        optimizer.step()
        for old, new in zip(model["teacher"].parameters(), model["student"].parameters(), strict=True):
            old.data = 0.9 * old.data + 0.1 * new.data


def loss_of_nothing(run):
    model = stack()
    for _ in run.steps(model, sgd(model), samples(), loss_fn=lambda y, targets: (y.detach() - targets).mean()):
        pass


def lazy(run):
    model = nn.Sequential(nn.LazyLinear(4))
    train_steps(run, model, optimizer=sgd(model))


def loaded_too_late(run):
    model = stack()
    steps = run.steps(model, sgd(model), samples(), loss_fn=nn.functional.mse_loss)
    model.load_state_dict(stack().state_dict())
    for _ in steps:
        pass


def models_differ(run):
    train_steps(run, stack() if RANK == 0 else nn.Sequential(*stack(), nn.Linear(4, 4)))


def values_differ(run):
    torch.manual_seed(RANK)
    train_steps(run, stack())


def settings_differ(run):
    train_steps(run, stack())


def optimizers_differ(run):
    model = stack()
    train_steps(run, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1 + RANK))


def exception(run):
    for step in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        if step.index == 1 and run.rank == run.world_size - 1:
            raise ValueError("the user's own mistake\nin two lines")


def stops_for_a_number(run):
    for _ in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        run.stop(7)


def tells_nothing(run):
    run.on_step(None)


def exits(run):
    for step in run.steps(model := stack(), sgd(model), samples(), loss_fn=nn.functional.mse_loss):
        if step.index == 1 and run.rank == 0:
            sys.exit(3)


OVERRIDES = {
    "batch_size": {"global_batch_size": 7, "micro_batch_size": 2},
    "layers": {"stages": 4},
    "workers": {"stages": 3},
    "uncuttable": {"stages": 2},
    "prepare_stages": {"stages": 2},
    "settings_differ": {"steps": 4 + RANK},
    "scheduler_in_batches": {"steps": 0, "epochs": 2},
}


def main(case):
    everstep.elastic(**{**SETTINGS, **OVERRIDES.get(case, {})})(globals()[case])()


if __name__ == "__main__":
    main(sys.argv[1])
