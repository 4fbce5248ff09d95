"""The command line: ``splitwatch demo | inspect | report | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitwatch.records import HiddenLayer, SplitWatchError

if TYPE_CHECKING:
    from torch import nn

    from splitwatch.probe import Probe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except SplitWatchError as error:
        Console(stderr=True).print(f"[bold red]splitwatch:[/bold red] {escape(str(error))}", highlight=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwatch", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="a narrow network gets stuck on digits, is diagnosed, widened, freed")
    demo.add_argument("--logdir", type=Path, default=Path("runs/demo"), help="where TensorBoard's files go")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=_count, default=4200, help="training steps of each of the three runs")
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="what can be widened in a model, or how a checkpoint grew")
    inspect.add_argument("target", help="a checkpoint file, or package.module:function that returns (model, probe)")
    inspect.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        help="neurons are redundant if their incoming weights agree, or their outgoing weights vanish, up to this "
        "relative to the larger (default 1e-6; 0 for exact only, 1e-2 for nearly redundant)",
    )
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser("report", help="the growth events of a TensorBoard log directory")
    report.add_argument("logdir", type=Path)
    report.set_defaults(run=_report)
    bench = commands.add_parser("bench", help="what measuring costs on this machine, against a training step")
    bench.add_argument("--width", type=_count, default=512, help="neurons in each of the two hidden layers")
    bench.set_defaults(run=_bench)
    return parser


def _count(text: str) -> int:
    """A whole number that counts something, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"required a whole number ≥ 1, found {text!r}")
    return int(text)


def _demo(options: argparse.Namespace) -> None:
    import torch

    from splitwatch.lightning.demo import run

    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    run(options.logdir, options.seed, options.steps)


def _inspect(options: argparse.Namespace) -> None:
    if ":" in options.target and not Path(options.target).exists():
        from splitwatch.growth.reduction import redundancy
        from splitwatch.growth.trial import tried
        from splitwatch.layers import find_hidden_layers

        model, probe = _load(options.target)
        layers = find_hidden_layers(model, probe)
        redundant = redundancy(model, layers, options.tolerance, probe=probe)
        layers = tried(model, layers, probe, {layer.name for layer in layers if layer.growable})
        Console().print(layer_table(layers, redundant, options.tolerance))
    else:
        Console().print(_history_table(Path(options.target), options.tolerance))


def layer_table(layers: Sequence[HiddenLayer], redundant: Mapping[str, int], tolerance: float) -> Table:
    """Every layer with how many of its neurons are redundant, and what it can do or why it cannot."""
    table = Table(title=f"Hidden layers, {_redundant_at(tolerance)}")
    for heading in ("layer", "neurons", "redundant", "can be widened"):
        table.add_column(heading)
    for layer in layers:
        words = f"no: {layer.reason}" if layer.reason else "yes: " + str(layer).split(": ", 2)[2]
        table.add_row(layer.name, str(layer.width or ""), str(redundant.get(layer.name, "")), escape(words))
    return table


def _redundant_at(tolerance: float) -> str:
    return f"redundant neurons at relative tolerance {tolerance:g}"


def _load(target: str) -> tuple[nn.Module, Probe]:
    """Call ``package.module:function`` with the working directory on the path."""
    from torch import nn

    from splitwatch.growth.policy import imported
    from splitwatch.probe import Probe

    sys.path.insert(0, str(Path.cwd()))
    function = imported("target", target)
    try:
        signature(function).bind()
    except (TypeError, ValueError) as error:
        raise SplitWatchError(
            f"target: required a function without arguments, found {target!r}: {error}; give them defaults"
        ) from error
    match function():
        case (nn.Module() as model, Probe() as probe):
            return model, probe
        case found:
            raise SplitWatchError(
                f"target: required a function that returns (model, probe), found {type(found).__name__} from {target!r}"
            )


def _history_table(path: Path, tolerance: float) -> Table:
    from splitwatch.growth.checkpoint import read_history
    from splitwatch.growth.stored import stored_redundancy

    history, redundant = read_history(path), stored_redundancy(path, tolerance)
    name = escape(path.name)
    title = f"Growth recorded in {name}, {_redundant_at(tolerance)}" if history else f"{name} records no growth"
    table = Table(title=title)
    for heading in ("layer", "widths", "redundant", "consumers"):
        table.add_column(heading)
    for name, entry in history.items():
        consumers = ", ".join(consumer[0] for consumer in entry["consumers"])
        found = redundant[name]
        words = "not told by the file" if found is None else str(found)
        table.add_row(name, " → ".join(map(str, entry["widths"])), words, consumers)
    return table


def _report(options: argparse.Namespace) -> None:
    from splitwatch.report.board import read_events

    texts = read_events(options.logdir)
    if not texts:
        raise SplitWatchError(f"logdir: required TensorBoard files with growth events, found none in {options.logdir}")
    for step, text in texts:
        Console().print(f"[bold]step {step}[/bold]")
        Console().print(text, markup=False, highlight=False)


def _bench(options: argparse.Namespace) -> None:
    from splitwatch.bench import curvature_costs

    table = Table(title=f"784-{options.width}-{options.width}-10, batch 1024, float32, one thread")
    for heading in ("", "CPU seconds", "training steps"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, seconds, ratio in curvature_costs(options.width):
        table.add_row(name, f"{seconds:.3f}", f"{ratio:.2f}")
    Console().print(table)
