"""What the documentation says can be run, and the tests it names exist."""

import copy
import pathlib
import re

import pytest
import torch
from torch import nn

import splitwatch
from splitwatch import Probe, inner_hessian
from splitwatch.report.figures import plateau_figure

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_the_plateau_of_a_neuron_takes_three_lines(tmp_path, monkeypatch):
    page = (ROOT / "docs/concepts/plateau.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    probe = Probe([x[:10], x[10:]], lambda model, x: model(x).square().mean())
    monkeypatch.chdir(tmp_path)
    exec(
        code,
        {
            "torch": torch,
            "inner_hessian": inner_hessian,
            "plateau_figure": plateau_figure,
            "model": model,
            "probe": probe,
        },
    )
    assert (tmp_path / "plateau.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:tests|examples|benchmarks|docs)/[\w/]+\.py)(?:::(\w+))?`", text):
        path = ROOT / name[0]
        assert path.exists(), name
        assert not name[1] or f"def {name[1]}" in path.read_text(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_the_policies_page_runs(capsys):
    page = (ROOT / "docs/how-to/policies.md").read_text()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(256, 3)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    names = {
        name: getattr(splitwatch, name) for name in splitwatch.__all__ if not name.startswith(("log_", "SplitWatch"))
    }
    names |= {"torch": torch, "copy": copy, "model": model, "batches": list(zip(x.split(32), y.split(32), strict=True))}
    names["loss_fn"] = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(code, names)
    assert names["net"][0].out_features == 16
    assert "chosen by lowest_curvature" in capsys.readouterr().out
