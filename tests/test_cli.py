"""The command line, as a newcomer would use it."""

import pytest
import torch
from torch import nn

from splitwatch import GrowthPolicy, Probe, find_hidden_layers, grow, measure_geometry, plan_growth
from splitwatch.cli import main
from splitwatch.growth.embedding import critical_embedding

MODEL = """
import torch
from torch import nn
from splitwatch import Probe

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1))
    x = torch.randn(16, 3)
    return model, Probe([x[:8], x[8:]], lambda model, x: model(x).square().mean())
"""


def test_inspect_prints_what_can_be_widened_and_why_the_rest_cannot(tmp_path, monkeypatch, capsys):
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "cli_model:build"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "yes" in printed
    assert "layer_norm" in printed
    assert "output layer" in printed


def test_inspect_tells_of_widths_written_into_the_code(tmp_path, monkeypatch, capsys):
    insists = MODEL.replace("nn.Tanh()", "nn.Tanh(), nn.Unflatten(1, (4,))")
    (tmp_path / "cli_insists.py").write_text(insists)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "cli_insists:build"]) == 0
    assert "does not follow its width" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_inspect_counts_redundant_neurons(tmp_path, monkeypatch, capsys):
    """Neuron 1 nearly repeats neuron 0, nobody reads neuron 2, neuron 3 reads nothing."""
    spoilt = MODEL.replace(
        "    x = torch",
        """    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0] * (1 + 1e-4), model[0].bias[0]
        model[2].weight[:, 2] = 0
        model[0].weight[3] = 0
    x = torch""",
    )
    (tmp_path / "cli_redundant.py").write_text(spoilt)
    monkeypatch.chdir(tmp_path)
    for arguments, title, count in [
        ([], "1e-06", "2"),
        (["--tolerance", "1e-2"], "0.01", "3"),
        (["--tolerance", "0"], "0", "2"),
    ]:
        assert main(["inspect", "cli_redundant:build", *arguments]) == 0
        printed = capsys.readouterr().out
        assert f"at relative tolerance {title}" in " ".join(printed.split())
        (row,) = [line for line in printed.splitlines() if "yes" in line]
        assert [cell.strip() for cell in row.strip("│").split("│")][:3] == ["0", "4", count]
    assert main(["inspect", "cli_redundant:build", "--tolerance", "-1"]) == 1
    assert "tolerance" in capsys.readouterr().err


def test_inspect_prints_how_a_checkpoint_grew(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    x = torch.randn(200, 3)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    probe = Probe([(x[:100], y[:100]), (x[100:], y[100:])], lambda m, b: (m(b[0]) - b[1]).square().mean())
    plan = plan_growth(model, measure_geometry(model, probe), probe, GrowthPolicy(max_neurons=1))
    assert plan
    grow(model, plan, probe=probe)
    torch.save(model.state_dict(), tmp_path / "grown.pt")
    assert main(["inspect", str(tmp_path / "grown.pt")]) == 0
    assert row_of(capsys)[:3] == ["0", "2 → 3", "0"]
    torch.save(
        critical_embedding(model, find_hidden_layers(model, probe)[0], 1, (0.5, 0.5)).state_dict(), tmp_path / "b.pt"
    )
    assert main(["inspect", str(tmp_path / "b.pt"), "--tolerance", "1e-8"]) == 0
    assert row_of(capsys, "at relative tolerance 1e-08")[:3] == ["0", "2 → 3 → 4", "1"]


def row_of(capsys, title="at relative tolerance 1e-06"):
    """The cells of the one row with an arrow."""
    printed = capsys.readouterr().out
    assert title in " ".join(printed.split())
    (row,) = [line for line in printed.splitlines() if "→" in line]
    return [cell.strip() for cell in row.strip("│").split("│")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nothing.pt"], "existing file"),
        (["inspect", "no_such_module:build"], "package.module:function"),
        (["inspect", "[/x]:build"], "found '[/x]:build'"),
        (["inspect", "math:pi"], "required a function, found float"),
        (["inspect", "cli_wrong:needy"], "a function without arguments"),
        (["inspect", "cli_wrong:nothing"], "returns (model, probe), found NoneType"),
        (["inspect", "cli_wrong.py"], "a file that torch.save wrote"),
        (["inspect", "."], "a file that torch.save wrote"),
        (["report", "no_such_folder"], "logdir"),
    ],
)
def test_bad_arguments_end_in_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "cli_wrong.py").write_text("def needy(x): return x\n\ndef nothing(): return None\n")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [["bench", "--width", "0"], ["demo", "--steps", "-1"], ["demo", "--steps", "x"]])
def test_counts_below_one_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"{arguments[1]}: required a whole number ≥ 1, found {arguments[2]!r}" in capsys.readouterr().err


def test_bench_prints_costs_in_training_steps(capsys):
    assert main(["bench", "--width", "16"]) == 0
    assert "inner Hessian product" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*treespec.*")
def test_the_demonstration_ends_with_the_widened_network_ahead(tmp_path, capsys):
    from splitwatch.lightning.demo import run

    scores = run(tmp_path)
    after = {name.split(": ")[1]: row for name, row in scores.items() if ": " in name}
    assert after["splitwatch"].train_loss < after["naive duplication"].train_loss < after["no growth"].train_loss
    assert after["splitwatch"].loss < after["naive duplication"].loss
    assert scores["at growth"].train_loss < scores["before growth"].train_loss
    assert main(["report", str(tmp_path)]) == 0
    assert "grew by" in capsys.readouterr().out
