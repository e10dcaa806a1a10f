"""Truncated backpropagation through time: a hidden state that each column of the text carries from batch to batch.

`plain`: without Everstep, by one process that sums the gradients of the four parts of a batch. `resumes`: it gets
SIGTERM after its first step, saves, ends, and is resumed in the same process until it is done. `seldom`: the state is
carried in every second batch only, and cleared in each fifth. `mistake`: what to do wrong. `yields`: by `run.steps`.
`more`: numbers that are carried besides the hidden state, and count in the loss.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
EPOCHS, COLUMNS, PART, WINDOWS, LENGTH = 3, 8, 2, 5, 4
lines = (out / f"losses-{mine}.txt").open("a")


class Text(torch.utils.data.Dataset):
    """Samples in the order of a batchified text: window w of each column, then window w + 1."""

    def __len__(self):
        return WINDOWS * COLUMNS

    def __getitem__(self, index):
        window, column = divmod(index, COLUMNS)
        at = column * WINDOWS * LENGTH + window * LENGTH
        words = (torch.arange(at, at + LENGTH + 1) ** 2 % 11).long()
        return column // PART, window, words[:-1], words[1:]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.decoder = nn.Linear(6, 11)

    def forward(self, words, hidden):
        found, hidden = self.rnn(self.encoder(words), hidden)
        return self.decoder(found).flatten(0, 1), hidden


def with_more(loss, values, step):
    """The loss, and the numbers that are carried: those that were there, plus the step."""
    values = torch.zeros(config["more"]) if values is None else values
    values = values + step
    return loss + values.mean() / 1000 * loss, values


def carried(hidden, window):
    """The hidden state that the next batch begins with; None: what is there stays."""
    return None if config.get("seldom") and window % 2 else hidden


def train_plain():
    torch.manual_seed(5)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loader = torch.utils.data.DataLoader(Text(), batch_size=PART)
    for epoch in range(EPOCHS):
        states, more, sums, step = {}, {}, [], WINDOWS * epoch
        for slots, windows, words, targets in loader:
            slot, window = int(slots[0]), int(windows[0])
            output, hidden = model(words, states.get(slot))
            loss = nn.functional.cross_entropy(output, targets.flatten())
            if config.get("more"):
                loss, more[slot] = with_more(loss, more.get(slot) if window else None, step)
            if carried(hidden, window) is not None:
                states[slot] = tuple(value.detach() for value in hidden)
            if config.get("seldom") and window == 4:
                del states[slot]
            print(step, slot, loss.item().hex(), file=lines, flush=True)
            sums.append(torch.autograd.grad(loss, list(model.parameters())))
            if len(sums) == COLUMNS // PART:
                for parameter, a, b, c, d in zip(model.parameters(), *sums, strict=True):
                    parameter.grad = ((a + b) + (c + d)) / 4
                optimizer.step()
                sums, step = [], step + 1
    states = {name: {"momentum_buffer": optimizer.state[p]["momentum_buffer"]} for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "optimizer": states}, out / "state-0.pt")


def mistake(run):
    if config.get("mistake") == "large":
        run.stream_state["hidden"] = "x" * (1 << 18)


@everstep.elastic(epochs=EPOCHS, global_batch_size=COLUMNS, micro_batch_size=PART, seed=5)
def train(run):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loader = torch.utils.data.DataLoader(Text(), batch_size=COLUMNS, num_workers=config.get("workers", 0))
    if config.get("yields"):
        train_by_steps(run, model, optimizer)
        return
    model, optimizer, loader = run.prepare(model, optimizer, loader)

    @run.on_step
    def stop(step):
        if config.get("resumes"):
            signal.raise_signal(signal.SIGTERM)

    for _ in run.epochs():
        for slots, windows, words, targets in loader:
            slot, window, step = int(slots[0]), int(windows[0]), run.step
            mistake(run)
            before = run.stream_state.get("hidden")
            output, hidden = model(words, before)
            loss = nn.functional.cross_entropy(output, targets.flatten())
            if config.get("more"):
                loss, run.stream_state["more"] = with_more(loss, run.stream_state.get("more"), step)
            assert hidden[0].requires_grad
            if carried(hidden, window) is not None:
                run.stream_state["hidden"] = hidden
                assert not run.stream_state["hidden"][0].requires_grad
            if config.get("seldom") and window == 4:
                run.stream_state.clear()
            print(step, slot, loss.item().hex(), file=lines, flush=True)
            loss.backward()
            if before is not None:
                before[0].zero_()  # a copy: of no account
            optimizer.step()
            if config.get("mistake") == "late":
                run.stream_state["hidden"] = hidden
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


class Carrying(nn.Module):
    """The model, with the state of its micro-batch."""

    def __init__(self, run, model):
        super().__init__()
        self.run, self.model = run, model

    def forward(self, words):
        output, self.run.stream_state["hidden"] = self.model(words, self.run.stream_state.get("hidden"))
        return output


def train_by_steps(run, model, optimizer):
    def loss_fn(output, targets):
        loss = nn.functional.cross_entropy(output, targets[2].flatten())
        if config.get("more"):
            loss, run.stream_state["more"] = with_more(loss, run.stream_state.get("more"), run.step)
        print(run.step, int(targets[0][0]), loss.item().hex(), file=lines, flush=True)
        return loss

    data = [(words, (slot, window, targets)) for slot, window, words, targets in (Text()[i] for i in range(40))]
    model = Carrying(run, model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    loader = torch.utils.data.DataLoader(data, batch_size=COLUMNS)
    for _ in run.steps(model, optimizer, loader, loss_fn=loss_fn):
        if config.get("resumes"):
            signal.raise_signal(signal.SIGTERM)
    state = run.full_state_dict()
    plain = {key: {name.removeprefix("model."): value for name, value in state[key].items()} for key in state}
    torch.save(plain, out / f"state-{mine}.pt")


if __name__ == "__main__":
    while not (out / f"state-{mine}.pt").exists():
        try:
            (train_plain if config.get("plain") else train)()
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGTERM:
                raise
