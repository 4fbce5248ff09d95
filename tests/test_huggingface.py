"""Hugging Face's Trainer with a growing model; skipped where transformers is not installed."""

from dataclasses import replace

import pytest
import torch
from runs import SOON

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from splitwatch import Grower, SplitWatchError  # noqa: E402
from splitwatch.huggingface import SplitWatchCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LAYER = "bert.encoder.layer.0.intermediate.dense"
POLICY = replace(SOON, layers=[LAYER], max_neurons=1, moves="even")


def classifier(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=3,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def sentences(n=320):
    tokens = torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.sum() % 3} for row in tokens]


def trainer_of(folder, callbacks, model=None, **settings):
    arguments = {
        "output_dir": str(folder), "max_steps": 30, "per_device_train_batch_size": 32, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_steps": 5, "logging_steps": 5, "seed": 0,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**arguments | settings)
    return transformers.Trainer(model or classifier(), arguments, train_dataset=sentences(), callbacks=callbacks)


def width(model):
    return model.get_submodule(LAYER).out_features


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, watch = tmp_path_factory.mktemp("run"), SplitWatchCallback(POLICY)
    trainer = trainer_of(folder, [watch])
    trainer.train()
    return trainer, watch, folder


def test_it_grows_and_the_optimizers_state_comes_along(straight):
    trainer, watch, _ = straight
    assert [event.step for event in watch.grower.events if event.grown] == [10, 20]
    assert width(trainer.model) == 5
    assert all(event.drift <= 1e-6 and event.restarted == () for event in watch.grower.events)
    optimizer = trainer.optimizer.optimizer  # inside of accelerate's wrapper
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trainer.model.parameters())
    assert optimizer.state[trainer.model.get_submodule(LAYER).weight]["step"] == 30
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("step", [5, 15])
def test_a_narrow_model_resumes_to_the_bit(straight, step):
    trainer, watch, folder = straight
    other = SplitWatchCallback(POLICY)
    again = trainer_of(folder, [other], save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert other.grower.steps == watch.grower.steps == 30
    pairs = zip(again.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_monitoring_leaves_the_run_as_it_was(tmp_path):
    models = []
    for callbacks in ([], [SplitWatchCallback(POLICY, monitor_only=True)]):
        trainer = trainer_of(tmp_path, callbacks, classifier(dropout=0.1), save_strategy="no")
        trainer.train()
        models.append(trainer.model)
    assert callbacks[0].grower.events
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_step_of_accumulated_batches_is_one_step_with_their_mean_loss(tmp_path, monkeypatch):
    observe = Grower.observe
    watch, losses = SplitWatchCallback(replace(POLICY, probe_samples=128)), []
    monkeypatch.setattr(
        Grower, "observe", lambda self, batch, loss: losses.append(float(loss)) or observe(self, batch, loss)
    )
    trainer = trainer_of(
        tmp_path, [watch], gradient_accumulation_steps=2, per_device_train_batch_size=16, logging_steps=1, max_steps=12
    )
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert watch.grower.steps == 12
    assert [event.step for event in watch.grower.events if event.grown] == [10]
    assert losses == pytest.approx(logged, abs=1e-4)


def test_what_cannot_follow_is_refused_by_name(tmp_path):
    with pytest.raises(SplitWatchError, match="model: required one that returns its loss"):
        trainer_of(tmp_path, [SplitWatchCallback(POLICY)], label_smoothing_factor=0.1, max_steps=2).train()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments.deepspeed = "stage3.json"
    with pytest.raises(SplitWatchError, match=r"args: required one process, .* deepspeed='stage3.json'"):
        SplitWatchCallback(POLICY).on_init_end(arguments, None, None)
    with pytest.raises(SplitWatchError, match=r"args: .* control=5"):
        trainer_of(tmp_path, [SplitWatchCallback(replace(POLICY, control=5))])
