"""Draw the figures of docs/concepts from small networks: ``python docs/figures.py``."""

import pathlib

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from splitwatch import Probe, inner_hessian, measure_geometry
from splitwatch.geometry.escape import one_sided_derivatives
from splitwatch.report.figures import plateau_figure, spectrum_figure

FOLDER = pathlib.Path(__file__).parent / "figures"


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def stuck(activation, width=1, outputs=1, samples=40, start=0):
    """A tiny network at a stationary point of its training loss, found by L-BFGS in float64, and its probe."""
    torch.manual_seed(start)
    model = nn.Sequential(nn.Linear(2, width, bias=False), activation, nn.Linear(width, outputs)).double()
    x = torch.randn(samples, 2, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:].square() + torch.zeros(samples, outputs, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = mse(model, (x, y))
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return model, Probe([(x[::2], y[::2]), (x[1::2], y[1::2])], mse)


def definite(sign):
    """The first such network whose one inner Hessian is positive (or negative) definite."""
    for start in range(200):
        model, probe = stuck(nn.Tanh(), start=start)
        spectrum = torch.linalg.eigvalsh(inner_hessian(model, "0", probe)[0])
        modest = float(model[2].weight.detach().abs()) < 3
        if modest and bool((sign * spectrum > 1e-3).all()):
            return model, probe, spectrum
    raise RuntimeError("no definite inner Hessian found; allow more starts")


def plateau():
    _, _, spectrum = definite(+1)
    title = "a neuron with a positive definite inner Hessian, one output"
    return plateau_figure(float(spectrum[0]), float(spectrum[-1]), title=title)


def coupling():
    """The same curvatures with a coupling: the lowest is negative for every coefficient."""
    title = "a neuron with a positive definite inner Hessian and a coupling, four outputs"
    return plateau_figure(0.4, 1.5, coupling_norm=0.3, outputs=4, title=title)


def inner_hessians():
    """Twelve GELU neurons on handwritten digits, after 1,500 steps of Adam."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for _ in range(1500):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss_fn(model, (x[rows], y[rows])).backward()
        optimizer.step()
    return spectrum_figure(
        measure_geometry(model, Probe(list(zip(x.split(128), y.split(128), strict=True)), loss_fn))["0"]
    )


def embedding():
    """The loss over a plateau (λ₁) and across it (the copies part along the lowest eigenvector)."""
    model, probe, _ = definite(+1)
    direction = torch.linalg.eigh(inner_hessian(model, "0", probe)[0]).eigenvectors[:, -1]
    w, v, bias = model[0].weight.detach()[0], model[2].weight.detach()[0, 0], model[2].bias.detach()
    x, y = (torch.cat(parts) for parts in zip(*probe.half("all"), strict=True))
    coefficients, distances = torch.linspace(-0.8, 1.8, 131).double(), torch.linspace(-0.6, 0.6, 101).double()

    def loss(first, s):
        parted = first * torch.tanh(x @ (w + (1 - first) * s * direction))
        parted = parted + (1 - first) * torch.tanh(x @ (w - first * s * direction))
        return (v * parted[:, None] + bias - y).square().mean()

    surface = torch.stack([torch.stack([loss(t, s) for t in coefficients]) for s in distances]) - loss(0.5, 0.0)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    bound = 2 * float(surface.max())
    levels = torch.linspace(-bound, bound, 32)
    drawn = axes.contourf(coefficients, distances, surface.clamp(-bound, bound), levels, cmap="RdBu_r")
    axes.axhline(0, color="black", linewidth=2)
    axes.set(
        xlabel="λ₁ (λ₂ = 1 − λ₁)", ylabel="how far the copies part", title="the plateau (line) and the loss around it"
    )
    figure.colorbar(drawn, label="loss − plateau")
    return figure


def escape():
    """The rate at which the loss changes as one ReLU neuron's incoming weights move, by angle."""
    torch.manual_seed(1)
    model, probe = stuck(nn.ReLU(), width=3, outputs=2, samples=60)
    with torch.no_grad():  # one sample comes to lie on the first neuron's kink
        x = probe.fitted[0][0]
        model[0].weight[0] -= (model[0].weight[0] @ x[0]) / (x[0] @ x[0]) * x[0]
    angles = torch.linspace(0, 2 * torch.pi, 721).double()
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    rates = one_sided_derivatives(model, "0", probe, directions.expand(3, -1, -1))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for r, rate in enumerate(rates):
        axes.plot(angles.rad2deg(), rate, label=f"neuron {r}" + (", one sample on its kink" if r == 0 else ""))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="direction of the step in w (degrees)", ylabel="one-sided derivative of the loss")
    axes.set_title("cosines away from the kinks; a sample on a kink bends the curve")
    axes.set_xticks(range(0, 361, 90))
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (plateau, coupling, inner_hessians, embedding, escape):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=110)
        print(FOLDER / f"{draw.__name__}.png")
