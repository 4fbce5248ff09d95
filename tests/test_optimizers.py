"""What growth is to every optimizer of torch.optim, and to those of others: the table of docs/how-to/optimizers.md.

python tests/test_optimizers.py prints the table.
"""

import inspect
import pathlib
import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from splitwatch import GrowthPlan, Probe, Split, Sprout, find_hidden_layers, grow
from splitwatch.growth import optimizer as carrying

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "how-to" / "optimizers.md"
BOUND = 1e-9
STEPS = 6  # before growth, and after it
CLASSES = sorted(
    name for name, kind in vars(optim).items()
    if inspect.isclass(kind) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
)  # fmt: skip
SETTINGS = {
    "plain": {}, "momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True}, "amsgrad": {"amsgrad": True}, "decoupled weight decay": {"weight_decay": 0.1},
    "line search": {"line_search_fn": "strong_wolfe"}, "foreach": {"foreach": True}, "fused": {"fused": True},
    "tensor lr": {"lr": torch.tensor(0.02)}, "capturable": {"capturable": True},
}  # fmt: skip
"""Each is measured with every class that has such an argument."""

ARGUMENTS = {"plain": "params", "decoupled weight decay": "decoupled_weight_decay", "tensor lr": "lr"}
ARGUMENTS |= {"line search": "line_search_fn"}
REFUSED = "refused by torch on a CPU"


class Network(nn.Module):
    """Sparse gradients in front, hidden layers behind."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(5, 3, sparse=sparse)
        self.top = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2))
        self.double()

    def forward(self, x):
        return self.top(self.embed(x))


def loss_of(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def batches(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(5, (8,), generator=generator), torch.randn(8, 2, generator=generator).double())
        for _ in range(count)
    ]


@cache
def layers():
    return tuple(x for x in find_hidden_layers(Network(), Probe(batches(2), loss_of)) if x.growable)


@cache
def dead_neurons():
    """One in every layer."""
    moves = [Sprout("top.0", torch.zeros(4), torch.zeros(3)), Sprout("top.2", torch.zeros(5), torch.zeros(2))]
    return GrowthPlan(layers(), tuple(moves), "dead neurons")


def optimizers_of(name, settings, model):
    """The optimizer for all that it takes, and SGD for what it does not take."""
    kind, parameters = getattr(optim, name), list(model.parameters())
    own = parameters
    if name == "SparseAdam":
        own = [model.embed.weight]
    elif name == "Muon":
        own = [parameter for parameter in parameters if parameter.ndim == 2]
    rest = [parameter for parameter in parameters if not any(parameter is other for other in own)]
    made = kind(own, **{"lr": 0.02, **settings})
    return [made, optim.SGD(rest, 0.02)] if rest else [made]


def trajectory(name, settings, widen, forget=()):
    """The losses of a run, widened in the middle or not, and whose state restarted; it may be forgotten there too."""
    model, restarted, losses = Network(sparse=name == "SparseAdam"), (), []
    optimizers = optimizers_of(name, settings, model)
    for step, batch in enumerate(batches(2 * STEPS)):
        if step == STEPS and widen:
            restarted = grow(model, dead_neurons(), optimizers).restarted
        for parameter in (model.get_parameter(name) for name in forget if step == STEPS):
            [optimizer.state.pop(parameter, None) for optimizer in optimizers]

        def closure(model=model, batch=batch, optimizers=optimizers):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        losses.append(float(optimizers[0].step(closure).detach()))
        for optimizer in optimizers[1:]:
            optimizer.step()
    return torch.tensor(losses, dtype=torch.float64), restarted


def deviation(one, other):
    return float(((one - other).abs() / one).max())


@cache
def measured(name, setting):
    """What growth by dead neurons is to an optimizer, in a word, and the largest relative deviation of the losses.

    The deviation is from a run that does not grow; where state restarts, from one that forgets the same state then.
    """
    settings = SETTINGS[setting]
    if setting == "decoupled weight decay":
        settings = settings | {"decoupled_weight_decay": True}
    try:
        straight, _ = trajectory(name, settings, widen=False)
    except (RuntimeError, AssertionError) as refusal:
        assert "capturable" in str(refusal)
        return REFUSED, None
    widened, restarted = trajectory(name, settings, widen=True)
    assert straight[-1] != straight[0]
    if restarted:
        straight, _ = trajectory(name, settings, widen=False, forget=restarted)
    found = deviation(straight, widened)
    words = ["a restart"] * bool(restarted) + ["not invariant"] * (found > BOUND)
    return ", ".join(words) or "exact", found


@cache
def rows():
    """The table: classes, settings, what growth is to them, and the largest deviation of any."""
    by_class, found = {}, {}
    for name in CLASSES:
        arguments = inspect.signature(getattr(optim, name)).parameters
        for setting in SETTINGS:
            if ARGUMENTS.get(setting, setting) in arguments:
                word, value = measured(name, setting)
                by_class.setdefault((name, word), []).append((setting, value))
    for (name, word), items in by_class.items():
        names, values = found.setdefault((tuple(setting for setting, _ in items), word), ([], []))
        names.append(f"`{name}`")
        values += [value for _, value in items]
    return {
        (", ".join(names), ", ".join(settings), word): None if None in values else max(values)
        for (settings, word), (names, values) in found.items()
    }


def claims(table):
    """What a table says of every class and setting: a word, and the largest deviation of the row."""
    return {
        (name, setting): (word, value)
        for (names, settings, word), value in table.items()
        for name in re.findall(r"`(\w+)`", names)
        for setting in settings.split(", ")
    }


def test_the_table_has_every_optimizer_and_says_what_is_measured_of_it():
    lines = re.findall(r"^\| (`\w.+?) \| (.+?) \| (.+?) \| (.*?) \|$", PAGE.read_text(), flags=re.MULTILINE)
    told = claims({tuple(words): float(value) if value else None for *words, value in lines})
    found = claims(rows())
    assert found.keys() == {key for key in told if key[0] in CLASSES}, (
        "python tests/test_optimizers.py prints the table"
    )
    assert {name for name, _ in found} == {*CLASSES}
    for key, (word, value) in found.items():
        claimed = told[key][1]
        assert (key, told[key][0]) == (key, word)
        assert (value is None) == (claimed is None) == (word == REFUSED)
        if value is not None:  # rounding differs from machine to machine
            assert value <= max(100 * claimed, 1e-14), key
            assert claimed <= BOUND or value >= claimed / 100, key


# --- optimizers of others --------------------------------------------------------------------------------------------


class Own(optim.Optimizer):
    """Keeps a state of its own under a name of its own."""

    def __init__(self, params, lr=0.02, key="trace"):
        super().__init__(params, {"lr": lr, "key": key})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.move(parameter, self.state[parameter], group)
        return loss


class Lion(Own):
    def move(self, parameter, state, group):
        average = state.setdefault(group["key"], torch.zeros_like(parameter))
        parameter -= group["lr"] * torch.sign(0.9 * average + 0.1 * parameter.grad)
        average.lerp_(parameter.grad, 0.01)


class Averaged(Own):
    """Steps on a copy of the parameter that it keeps."""

    def move(self, parameter, state, group):
        copy = state.setdefault(group["key"], parameter.clone())
        copy -= group["lr"] * parameter.grad
        parameter.lerp_(copy, 0.5)


class Shampoo(Own):
    """One matrix an axis: of a square weight they have its shape."""

    def move(self, parameter, state, group):
        direction = gradient = parameter.grad
        for axis, side in enumerate(self.sides(parameter, state)):
            flat = gradient.movedim(axis, 0).reshape(len(side), -1)
            side += flat @ flat.T
            direction = torch.tensordot(torch.linalg.inv(side), direction.movedim(axis, 0), 1).movedim(0, axis)
        parameter -= group["lr"] * direction

    def sides(self, parameter, state):
        return [state.setdefault(f"side{axis}", torch.eye(n).double()) for axis, n in enumerate(parameter.shape)]


class ListingShampoo(Shampoo):
    """The same in a list."""

    def sides(self, parameter, state):
        return state.setdefault("sides", [torch.eye(n).double() for n in parameter.shape])


def run(kind, key, widen, forget=()):
    model, restarted, losses = Network(), (), []
    optimizer = kind(model.parameters(), key=key)
    for step, batch in enumerate(batches(2 * STEPS)):
        if step == STEPS and widen:
            event = grow(model, dead_neurons(), optimizer)
            restarted = event.restarted
            assert not restarted or f"optimizer state restarted {', '.join(restarted)}" in " ".join(str(event).split())
        for name in forget if step == STEPS else ():
            del optimizer.state[model.get_parameter(name)]

        def closure(model=model, batch=batch, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return torch.tensor(losses, dtype=torch.float64), restarted


WIDENED = ("top.0.weight", "top.0.bias", "top.2.weight", "top.2.bias", "top.4.weight")


@pytest.mark.parametrize(("kind", "key"), [(Lion, "trace"), (Averaged, "master"), (Shampoo, ""), (ListingShampoo, "")])
def test_states_of_an_unknown_layout_or_name_restart_and_the_event_says_whose(kind, key):
    """The network has a square weight, whose factors have the weight's shape."""
    widened, restarted = run(kind, key, widen=True)
    assert sorted(restarted) == sorted(WIDENED)
    straight, _ = run(kind, key, widen=False, forget=restarted)
    assert deviation(straight, widened) <= BOUND
    assert deviation(run(kind, key, widen=False)[0], widened) > BOUND  # something was lost


def test_states_of_a_known_name_are_carried(monkeypatch):
    assert run(Lion, "exp_avg", widen=True)[1] == ()
    monkeypatch.setitem(carrying.STATES, "trace", carrying.LINEAR)
    monkeypatch.setattr(carrying, "VALUES", carrying.VALUES | {"master"})
    for kind, key in ((Lion, "exp_avg"), (Lion, "trace"), (Averaged, "master")):
        widened, restarted = run(kind, key, widen=True)
        assert restarted == ()
        assert deviation(run(kind, key, widen=False)[0], widened) <= BOUND


def test_averages_of_values_follow_the_split_itself(monkeypatch):
    """Carried like gradients they would put consumers' weights back to those of one neuron, which now has copies."""
    monkeypatch.setattr(carrying, "VALUES", carrying.VALUES | {"master"})
    split = Split("top.0", 1, (2.0, -1.0), torch.zeros(2, 4), torch.zeros(2, 3), 0.0)
    model = Network()
    optimizer = Averaged(model.parameters(), lr=0.0, key="master")
    for batch in batches(1):
        optimizer.step(lambda batch=batch: (loss := loss_of(model, batch)).backward() or loss)
    grow(model, GrowthPlan(layers(), (split,), "one split"), optimizer)
    for parameter in model.parameters():
        assert torch.equal(optimizer.state[parameter]["master"], parameter)


def grown_in_training(make, plan, steps=200):
    """A network widened in the middle of training, its optimizer, and the batches that come next."""
    model, (*before, after) = Network(), batches(steps + 1)
    optimizer = make(model.parameters())
    for batch in before:
        advance(model, optimizer, batch)
    grow(model, plan, optimizer)
    return model, optimizer, after


def advance(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "key", "begin"),
    [
        (lambda p: optim.Rprop(p, 0.02), "step_size", 0.02),
        (lambda p: optim.Adagrad(p, 0.02, initial_accumulator_value=0.3), "sum", 0.3),
        (lambda p: optim.Adam(p, 0.02), "exp_avg", 0.0),
        (lambda p: optim.Adam(p, 0.02), "exp_avg_sq", 0.0),
    ],
)
def test_states_of_new_neurons_begin_as_those_of_new_parameters(make, key, begin):
    """But for how large past gradients of outgoing weights were: as large as the others' in the mean."""
    model, optimizer, _ = grown_in_training(make, dead_neurons())
    hidden, reader = (optimizer.state[model.top[i].weight][key] for i in (0, 4))
    assert float(hidden[-1].min()) == float(hidden[-1].max()) == pytest.approx(begin)
    assert float((hidden[:-1] - begin).abs().max()) > 1e-9
    first = (
        reader[:, :-1].sqrt().mean(1).square() if carrying.STATES[key] is carrying.SQUARE else torch.full((2,), begin)
    )
    torch.testing.assert_close(reader[:, -1], first.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop"])
def test_new_outgoing_weights_do_not_start_with_steps_that_others_never_make(name):
    """With sizes of gradients at zero and no bias correction left, Adam's first step was three times the rate."""
    moves = (Sprout("top.2", torch.ones(5), torch.zeros(2)),)
    make = lambda p: getattr(optim, name)(p, lr=0.02)  # noqa: E731
    model, optimizer, batch = grown_in_training(make, GrowthPlan(layers(), moves, "one sprout"))
    reader = model.top[4].weight
    before = reader.detach().clone()
    advance(model, optimizer, batch)
    steps = (reader.detach() - before).abs()
    assert 0 < float(steps[:, -1].max()) <= 1.5 * float(steps[:, :-1].max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| optimizers | settings | dead neurons are | largest deviation |\n| --- | --- | --- | --- |")
    for words, value in rows().items():
        print(f"| {' | '.join(words)} | {'' if value is None else f'{value:.0e}' if value else '0'} |")
