"""Experiment trackers get what they can show: Lightning's own loggers, with fakes in the place of what they talk to."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from runs import QUIET, SOON, loader, module_of, trainer_of

from splitwatch import SplitWatch
from splitwatch.report.loggers import writer_of

pytestmark = pytest.mark.filterwarnings(*QUIET)


def packages(monkeypatch, **modules):
    """Modules of packages that are not installed: attributes by dotted name, double underscores for dots."""
    for name, attributes in modules.items():
        module = ModuleType(name.replace("__", "."))
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)


class MlflowClient:
    """The methods that are called of MLflow's, with its signatures."""

    def __init__(self, tracking_uri=None, registry_uri=None):
        self.metrics, self.files = {}, {}

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(experiment_id="0", run_id=run_id))

    def set_terminated(self, run_id, status=None, end_time=None):
        pass

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        self.metrics.update({metric.key: metric.step for metric in metrics})

    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        assert isinstance(figure, Figure)
        self.files[artifact_file] = run_id

    def log_text(self, run_id, text, artifact_file):
        assert text.startswith("## Step")
        self.files[artifact_file] = run_id


def mlflow(monkeypatch):
    monkeypatch.setattr(importlib.import_module(MLFlowLogger.__module__), "_MLFLOW_AVAILABLE", True)
    metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # noqa: E731
    packages(
        monkeypatch,
        mlflow={"set_tracking_uri": lambda uri: None},
        mlflow__tracking={"MlflowClient": MlflowClient},
        mlflow__entities={"Metric": metric},
    )
    return MLFlowLogger(run_id="run")


class Media:
    """wandb.Image and wandb.Table, with their first arguments."""

    def __init__(self, data_or_path=None, columns=None, data=None, dataframe=None):
        self.shown = data if data_or_path is None else data_or_path


class Run:
    def __init__(self):
        self.rows, self.id, self.name = [], "run", "run"

    def log(self, data, step=None, commit=None):
        self.rows.append(data)


def wandb(monkeypatch):
    monkeypatch.setattr(importlib.import_module(WandbLogger.__module__), "_WANDB_AVAILABLE", True)
    packages(
        monkeypatch,
        wandb={"Image": Media, "Table": Media},
        wandb__sdk={},
        wandb__sdk__lib={"RunDisabled": type("RunDisabled", (), {})},
        wandb__wandb_run={"Run": Run},
    )
    return WandbLogger(experiment=Run())


STEPS = 15


def fit(logger):
    watch = SplitWatch(SOON)
    trainer = trainer_of([watch], logger=logger, steps=STEPS, log_every_n_steps=5)
    trainer.fit(module_of(), loader())
    (event,) = watch.events
    assert event.grown
    return event.step


def test_mlflow_gets_pictures_and_pages_as_artifacts(monkeypatch):
    logger = mlflow(monkeypatch)
    step = fit(logger)
    client = logger.experiment
    assert client.metrics["splitwatch/growth/drift"] == step
    assert client.metrics["splitwatch/width/net.0"] == STEPS  # once more at the end
    assert set(client.files.values()) == {"run"}
    assert {f"splitwatch/event/{step:08}.md", f"splitwatch/spectrum/net.0/{step:08}.png"} <= set(client.files)


def test_weights_and_biases_gets_pictures_and_pages_at_their_step(monkeypatch):
    logger = wandb(monkeypatch)
    step = fit(logger)
    rows = {key: (value, row["trainer/global_step"]) for row in logger.experiment.rows for key, value in row.items()}
    assert rows["splitwatch/growth/drift"][1] == step
    assert rows["splitwatch/width/net.0"] == (4.0, STEPS)  # once more at the end
    (picture,), place = rows["splitwatch/spectrum/net.0"]
    assert isinstance(picture.shown, Figure)
    assert place == step
    page, place = rows["splitwatch/event"]
    assert page.shown[0][0].startswith(f"## Step {step}: grew")
    assert place == step


@pytest.mark.parametrize("experiment", [None, object(), SimpleNamespace(log_figure=None), SimpleNamespace(log_text=3)])
def test_a_logger_that_is_not_known_gets_numbers_and_nothing_breaks(experiment):
    rows = []

    class Own(Logger):
        name, version = "own", "0"

        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

        def log_hyperparams(self, *args, **kwargs):
            pass

    Own.experiment = experiment
    assert writer_of(Own()) is None
    fit(Own())
    assert any("splitwatch/width/net.0" in row for row in rows)


def test_a_process_that_is_not_the_first_draws_nothing(monkeypatch, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    monkeypatch.setattr("splitwatch.lightning.callback.writer_of", None)  # would fail if it were asked
    fit(logger)


def test_files_and_boards_are_told_apart(tmp_path):
    board = TensorBoardLogger(tmp_path)
    assert writer_of(board) is board.experiment
    assert writer_of(CSVLogger(tmp_path)) is None
    assert writer_of(object()) is None
