"""Whatever fails while a network grows, everything is as before: to the bit, and by identity."""

import copy
import gc
import inspect
import io
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import in_turn

import splitwatch
from splitwatch import Grower, GrowthPlan, GrowthPolicy, Probe, Split, SplitWatchError, Sprout, find_hidden_layers, grow
from splitwatch.records import UnfitPlanError

PACKAGE = str(Path(splitwatch.__file__).parent)


class InjectedError(Exception):
    """A failure that nothing else raises."""


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Also where whoever started the tests ignores ctrl-C, as shells do for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(count=2, n=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for _ in range(count)]


def scene(grown_before=False):
    """A network in training, three optimizers with state, a probe, and a plan with both kinds of moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    adam, sgd = torch.optim.Adam([model[3].weight], 1.0), torch.optim.SGD([model[3].bias], 0.1, momentum=0.9)
    optimizers = [torch.optim.AdamW(model[:2].parameters()), adam, sgd]
    probe = Probe(data(), mse)
    step(model, optimizers)
    if grown_before:
        grow(model, plan_for(model, probe), optimizers)
        step(model, optimizers)
    return model, optimizers, probe, plan_for(model, probe)


def plan_for(model, probe):
    (layer,) = (layer for layer in find_hidden_layers(model, probe) if layer.growable)
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, 4, generator=generator), torch.randn(2, 2, generator=generator)
    split = Split(layer.name, 1, (0.5, 0.5), u - u.mean(0), v - v.mean(0), 0.1)
    others = torch.eye(layer.width), 0.1 * torch.randn(layer.width, 2, generator=generator)
    sprout = Sprout(layer.name, u[0], v[0], 0.1, others=others, biases=v[1])
    return GrowthPlan((layer,), (split, sprout), "by hand")


def step(model, optimizers):
    mse(model, data(1, 5, seed=4)[0]).backward()
    for optimizer in optimizers:
        optimizer.step()


def saved(model, optimizers):
    """A checkpoint, as bytes."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, file)
    return file.getvalue()


class Picture:
    """Everything there is: objects by identity, values as copies."""

    def __init__(self, model, optimizers):
        self.model, self.optimizers = model, optimizers
        self.objects = self._objects()
        self.values = [copy.deepcopy(x.detach()) if isinstance(x, torch.Tensor) else x for _, x in self.objects]
        self.rng, self.file = torch.get_rng_state(), saved(model, optimizers)
        self.handler = signal.getsignal(signal.SIGINT)

    def _objects(self):
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        found = [*named, *((f"{name}.grad", p.grad) for name, p in self.model.named_parameters())]
        for name, module in self.model.named_modules():
            found += [(f"{name}.{k}", v) for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))]
            found += [(f"{name}.{k}", tuple(v.values())) for k, v in vars(module).items() if k.endswith("_hooks")]
        for i, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                found += [(f"{i} {key}", value) for key, value in group.items() if key != "params"]
                found += [(f"{i} parameter", p) for p in group["params"]]
            for p, state in optimizer.state.items():
                found += [(f"{i} key", p), *((f"{i} {key}", value) for key, value in state.items())]
        return found

    def assert_same(self):
        now = self._objects()
        assert [name for name, _ in now] == [name for name, _ in self.objects]
        for (name, old), (_, new), value in zip(self.objects, now, self.values, strict=True):
            if isinstance(old, torch.Tensor):
                assert old is new, name
                assert torch.equal(new.detach(), value), name
            else:
                assert new == value, name
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert saved(self.model, self.optimizers) == self.file
        assert signal.getsignal(signal.SIGINT) is self.handler


class Tracer:
    """Runs something and interferes once, when it comes by a place in the package for the n-th time.

    A place is a line, or the begin or the end of a function with the line that called it. What resumes and ends a
    generator is left out: there, nothing fails but by ctrl-C.
    """

    def __init__(self, events, act=None, target=None, n=1):
        self.events, self.act, self.target, self.left = events, act, target, n
        self.places = {}

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if event in self.events and (event == "line" or not code.co_flags & inspect.CO_GENERATOR):
            caller = 0 if event == "line" else frame.f_back.f_lineno
            place = (event, code.co_filename.removeprefix(PACKAGE), code.co_name, frame.f_lineno, caller)
            self.places[place] = self.places.get(place, 0) + 1
            if place == self.target:
                self.left -= 1
                if not self.left:
                    sys.settrace(None)
                    self.act()
        frame.f_trace_lines = "line" in self.events
        return self

    def run(self, call):
        before = sys.gettrace()
        gc.disable()  # so that what other tests left behind does not come by
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(before)
            gc.enable()


def fail(error):
    raise error


def interrupt():
    signal.raise_signal(signal.SIGINT)


def attempt(tracer, *, grown_before=False):
    """A growth with a tracer around it."""
    model, optimizers, probe, plan = scene(grown_before)
    before = Picture(model, optimizers)
    return before, lambda: tracer.run(lambda: grow(model, plan, optimizers, probe=probe))


def places(events, **settings):
    """Where growth comes by, each place with the number of times; not the call of ``grow`` itself."""
    tracer = Tracer(events)
    attempt(tracer, **settings)[1]()
    return {place: count for place, count in tracer.places.items() if place[2] != "grow" or place[0] == "line"}


@pytest.mark.parametrize("grown_before", [False, True])
def test_an_exception_at_the_begin_or_end_of_any_function_is_undone(grown_before):
    found = places(("call", "return"), grown_before=grown_before)
    names = {name for _, _, name, *_ in found}
    assert {"_drift", "prepare", "exchange", "commit", "_apply", "loss", "remember", "add"} <= names
    for i, (place, count) in enumerate(found.items()):
        inside = "/growth/" in place[1]
        if (not inside and place[0] == "return") or (grown_before and "checkpoint" not in place[1]):
            continue
        error = (InjectedError(), torch.OutOfMemoryError("injected"), MemoryError())[i % 3]
        n = 1 if place[0] == "call" else count
        before, growth = attempt(
            Tracer(place[:1], lambda error=error: fail(error), place, n), grown_before=grown_before
        )
        with pytest.raises((type(error), UnfitPlanError)) as raised:
            growth()
        assert error in (raised.value, raised.value.__cause__)
        before.assert_same()


SHAPERS = ("/growth/grow.py", "/growth/atomic.py", "/growth/checkpoint.py", "/growth/optimizer.py")


def test_ctrl_c_at_any_line_is_undone():
    """Among them every line between the exchange of the model's parameters and that of each optimizer's."""
    found = places(("line",))
    found = {p: n for p, n in found.items() if p[1] in SHAPERS or p[2] in ("commit", "_apply", "undo", "loss")}
    assert len(found) > 100
    for place, count in found.items():
        before, growth = attempt(Tracer(("line",), interrupt, place, count))
        with pytest.raises(KeyboardInterrupt):
            growth()
        if before.model[0].out_features > 4:  # it came when all was done: then nothing is half done
            assert place[2] in ("grow", "_grown", "held_back", "all_or_nothing", "check"), place
            assert before.model[3].in_features == 6
            assert len(before.optimizers[0].state) == len(before.optimizers[0].param_groups[0]["params"]) == 4
            step(before.model, before.optimizers)
        else:
            before.assert_same()


class Exhausted(TorchDispatchMode):
    """Memory that suffices for so many new tensors."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = (x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        if any(x.untyped_storage().data_ptr() not in known for x in made):
            self.room -= 1
            if self.room < 0:
                raise torch.OutOfMemoryError("injected")
        return result


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_memory_that_runs_out_at_any_allocation_is_named_so_and_undone(every):
    model, optimizers, probe, plan = scene()
    with Exhausted(10**9) as memory:
        grow(model, plan, optimizers, probe=probe)
    needed = 10**9 - memory.room
    assert needed > 200
    for room in range(0, needed, every):
        model, optimizers, probe, plan = scene()
        before = Picture(model, optimizers)
        with pytest.raises(torch.OutOfMemoryError, match="injected"), Exhausted(room):
            grow(model, plan, optimizers, probe=probe)
        before.assert_same()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["in_offset", "out_offset", "incoming", "outgoing", "others", "biases"])
@pytest.mark.parametrize("probed", [True, False])
def test_a_move_that_is_not_finite_is_refused_by_name(name, value, probed):
    model, optimizers, probe, plan = scene()
    before = Picture(model, optimizers)
    for move in plan.moves:
        if hasattr(move, name):
            found = getattr(move, name)
            (found[1] if name == "others" else found).view(-1)[-1] = value
    with pytest.raises(SplitWatchError, match=f"nan or inf in {name}"):
        grow(model, plan, optimizers, probe=probe if probed else None)
    before.assert_same()


def test_lbfgs_gets_its_history_back():
    model, _, probe, plan = scene()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: loss_of(model, optimizer))
    before = Picture(model, [optimizer])
    number = optimizer._numel_cache
    probe = Probe(data(), lambda m, b: fail(InjectedError()) if optimizer._numel_cache is None else mse(m, b))
    with pytest.raises(InjectedError):
        grow(model, plan, optimizer, probe=probe)
    before.assert_same()
    assert optimizer._numel_cache == number


def loss_of(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    loss = mse(model, data()[0])
    loss.backward()
    return loss


def test_elsewhere_than_in_the_main_thread_growth_works_too():
    model, optimizers, probe, plan = scene()
    events = []
    thread = threading.Thread(target=lambda: events.append(grow(model, plan, optimizers, probe=probe)))
    thread.start()
    thread.join()
    assert events[0].grown


# --- through the grower ----------------------------------------------------------------------------------------------

POLICY = GrowthPolicy(window=10, noise_ratio=1e6, max_neurons=2, max_overhead=None)


def watched():
    model, optimizers, probe, _ = scene()
    grower = Grower(model, optimizers, mse, POLICY, probe=Probe(data(4, 20), mse), progress=False)
    grower.observe(probe.fitted[0], 1.0)
    grower.watcher.pending = True
    return model, optimizers, grower


def stages():
    """Every function that the grower calls while it measures and grows, by its name there."""
    namespace, called = vars(sys.modules["splitwatch.grower"]), []
    ours = (name for name, value in namespace.items() if getattr(value, "__module__", "").startswith("splitwatch"))
    functions = {name: namespace[name] for name in ours if inspect.isfunction(namespace[name])}

    def noted(name, *args, **kwargs):
        called.append(name)
        return functions[name](*args, **kwargs)

    _, _, grower = watched()
    namespace.update({name: partial(noted, name) for name in functions})
    try:
        assert grower.act().grown
    finally:
        namespace.update(functions)
    return sorted(set(called))


@pytest.mark.parametrize(("name", "error"), in_turn(stages(), [InjectedError, KeyboardInterrupt]))
def test_a_stage_of_the_grower_that_fails_leaves_it_able_to_go_on(name, error, monkeypatch):
    model, optimizers, grower = watched()
    before, state = Picture(model, optimizers), grower.state_dict()

    def failing(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["splitwatch.grower"], name, failing)
        with pytest.raises(error):
            grower.act()
    before.assert_same()
    now = grower.state_dict()
    assert {k: v for k, v in now.items() if k not in ("budget", "pending")} == {
        k: v for k, v in state.items() if k not in ("budget", "pending")
    }
    assert not grower.events
    step(model, optimizers)
    grower.step(data(1, 5)[0], 1.0)
    grower.watcher.pending = True
    assert grower.act().grown
    assert grower.growths == 1


def test_a_sink_that_fails_is_told_once_and_the_event_is_kept():
    _, _, grower = watched()
    grower.sinks.append(lambda event: fail(InjectedError()))
    with pytest.raises(InjectedError):
        grower.act()
    assert [event.grown for event in grower.events] == [True]
    assert grower.growths == 1
    assert not grower.pending
    assert grower.step(data(1, 5)[0], 1.0) is None
