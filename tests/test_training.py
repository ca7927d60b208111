"""Tests of training.py: the loop, its choice of epoch, and that it is repeatable and leaves nothing behind."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import training
from errors import BenchmarkError
from training import EpochRow, FitPlan, Tally, fit, make_optimizer, rate_factor, train_epoch, validate

CPU = torch.device("cpu")
PLAN = FitPlan(3, 0.01, 0.01, "adamw", momentum=0.9, scheduler="cosine", patience=None)


class Batches:
    """A loader over tensors, cut where `sizes` say, that remembers the epochs it was told of."""

    def __init__(self, images, labels, sizes):
        self.parts = list(zip(images.split(sizes), labels.split(sizes), strict=True))
        self.epochs = []

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def make_data(count=22, sizes=(8, 8, 6), seed=0):
    """Images whose class is their brightest channel."""
    images = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 1.0
    return Batches(images, labels, list(sizes))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(80, 3)
    )


def run(model=None, plan=PLAN, seed=1, train=None, validation=None):
    model = make_model() if model is None else model
    train = make_data() if train is None else train
    validation = make_data(seed=1) if validation is None else validation
    return fit(model, train, validation, plan, device=CPU, description="test", seed=seed)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def script_validation(monkeypatch, outcomes):
    """Let validation come to these (correct of 100, loss) in turn; returns the weights that each epoch had."""
    seen, outcomes = [], iter(outcomes)

    def scripted(model, loader, device):
        seen.append(copy.deepcopy(model.state_dict()))
        correct, loss = next(outcomes)
        tally = Tally(device)
        tally.add(torch.tensor(loss), torch.eye(2)[(torch.arange(100) >= correct).long()], torch.zeros(100).long())
        return tally

    monkeypatch.setattr(training, "validate", scripted)
    return seen


def test_training_learns():
    result = run(plan=dataclasses.replace(PLAN, epochs=20))
    assert result.history[-1].train_loss < 0.3 < result.history[0].train_loss
    assert max(row.validation_accuracy for row in result.history) > 0.8


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_same_seed_gives_the_same_weights_bit_for_bit(optimizer):
    plan = dataclasses.replace(PLAN, optimizer=optimizer)
    first = run(plan=plan)
    torch.rand(7)  # the global generator has moved on
    again, other = run(plan=plan), run(plan=plan, seed=2)
    assert same_weights(first.model, again.model)
    assert not same_weights(first.model, other.model)  # dropout differs

    def untimed(result):
        return [dataclasses.replace(row, seconds=0) for row in result.history]

    assert untimed(first) == untimed(again)


def test_global_random_state_and_flags_are_left_alone():
    model = make_model()
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    run(model, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == flags


def test_argument_is_unchanged_and_the_result_is_in_eval_mode():
    model = make_model().train()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    before = copy.deepcopy(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    result = run(model)
    assert same_weights(model, before)
    assert all(module.training for module in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not any(module.training for module in result.model.modules())
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert not same_weights(model, result.model)


def test_result_has_the_memory_layout_of_the_argument():
    result = run()
    assert result.model[0].weight.is_contiguous()
    assert not result.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_training_and_validation_run_in_channels_last_layout():
    seen, layout = [], torch.channels_last

    def record(module, inputs):
        seen.append((module.weight.is_contiguous(memory_format=layout), inputs[0].is_contiguous(memory_format=layout)))

    model = make_model()
    model[0].register_forward_pre_hook(record)  # the copy that is trained has it too
    run(model)
    assert seen == [(True, True)] * 18  # 3 epochs of 3 training and 3 validation batches


def test_best_validation_epoch_is_returned_and_a_lower_loss_breaks_ties(monkeypatch):
    outcomes = [(50, 0.5), (80, 0.9), (70, 0.1), (80, 0.6), (80, 0.7), (60, 0.0)]
    seen = script_validation(monkeypatch, outcomes)
    result = run(plan=dataclasses.replace(PLAN, epochs=6))
    assert result.best_epoch == 4
    assert [row.validation_accuracy for row in result.history] == [0.5, 0.8, 0.7, 0.8, 0.8, 0.6]
    state = result.model.state_dict()
    assert all(torch.equal(state[key], seen[3][key]) for key in state)
    assert not torch.equal(state["5.weight"], seen[4]["5.weight"])


def test_first_of_equal_epochs_is_kept(monkeypatch):
    script_validation(monkeypatch, [(80, 0.5)] * 3)
    assert run().best_epoch == 1


@pytest.mark.parametrize(("patience", "epochs_run"), [(1, 3), (2, 6), (None, 8)])
def test_training_stops_after_patience_epochs_without_a_better_one(monkeypatch, patience, epochs_run):
    accuracies = [50, 60, 55, 70, 65, 70, 90, 90]
    script_validation(monkeypatch, [(correct, 0.5) for correct in accuracies])
    result = run(plan=dataclasses.replace(PLAN, epochs=8, patience=patience))
    assert len(result.history) == epochs_run
    assert result.best_epoch == accuracies.index(max(accuracies[:epochs_run])) + 1


def test_no_epochs_give_an_untrained_copy():
    model = make_model()
    result = run(model, plan=dataclasses.replace(PLAN, epochs=0))
    assert (result.history, result.best_epoch) == ([], 0)
    assert result.model is not model and same_weights(result.model, model)
    assert not result.model.training


def test_history_has_a_row_an_epoch_and_loaders_are_told_the_epoch():
    train = make_data()
    history = run(train=train).history
    assert [row.epoch for row in history] == train.epochs == [1, 2, 3]
    assert all(row.seconds > 0 for row in history)
    assert [row.lr for row in history] == pytest.approx([0.01, 0.0075, 0.0025])


def test_accuracy_and_loss_count_images_not_batches():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
    images = torch.tensor([[2.0, 0.0]] * 7).view(7, 2, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])  # 5 of 7 right; the mean of the batches' means would be 3 of 6
    tally = validate(model, Batches(images, labels, [6, 1]), CPU)
    assert tally.accuracy == 5 / 7
    right = math.log(1 + math.exp(-2))
    assert tally.loss == pytest.approx((5 * right + 2 * (right + 2)) / 7, rel=1e-6)


def test_train_epoch_counts_what_the_model_answered_before_each_step():
    model, loader = make_model(), make_data()
    reference = copy.deepcopy(model).train()
    optimizer, steps = (torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, reference))
    torch.manual_seed(3)
    tally = train_epoch(model, loader, optimizer, device=CPU)
    torch.manual_seed(3)
    correct, loss_sum = 0, 0.0
    for images, labels in loader:
        steps.zero_grad()
        logits = reference(images)
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        steps.step()
        correct += int((logits.argmax(1) == labels).sum())
        loss_sum += loss.item() * len(labels)
    assert tally.accuracy == correct / 22
    assert tally.loss == pytest.approx(loss_sum / 22, rel=1e-5)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_learning_rate_follows_the_schedule_at_every_step():
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    model = make_model()
    train_epoch(model, make_data(), Recorder(model.parameters(), lr=5.0), device=CPU, rate=lambda step: step / 10)
    assert rates == [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [("cosine", [1, 0.853553, 0.5, 0.146447, 0]), ("step", [1, 1, 0.1, 0.01, 0.01]), ("none", [1] * 5)],
)
def test_schedules(scheduler, factors):
    assert [rate_factor(scheduler, share / 4) for share in range(5)] == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_fused_optimizers_do_the_textbook_update(optimizer):
    plan = dataclasses.replace(PLAN, epochs=1, lr=0.1, optimizer=optimizer, momentum=0.5)
    weights = nn.Linear(3, 2)
    weights.bias.requires_grad_(False)
    used = make_optimizer(weights, plan)
    w, state = weights.weight.detach().double(), {"m": torch.zeros(2, 3), "v": torch.zeros(2, 3)}
    for step in (1, 2, 3):
        weights.weight.grad = torch.full((2, 3), 0.5 * step)
        g = weights.weight.grad.double()
        used.step()
        if optimizer == "sgd":  # Nesterov, as in PyTorch's documentation
            g = g + plan.weight_decay * w
            state["m"] = g if step == 1 else plan.momentum * state["m"] + g
            w = w - plan.lr * (g + plan.momentum * state["m"])
            continue
        if optimizer == "adam":
            g = g + plan.weight_decay * w
        else:
            w = w - plan.lr * plan.weight_decay * w
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["v"] = 0.999 * state["v"] + 0.001 * g**2
        corrected = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
        w = w - plan.lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
    torch.testing.assert_close(weights.weight.double(), w, rtol=1e-5, atol=1e-6)
    assert [group["params"] for group in used.param_groups] == [[weights.weight]]


def test_diverging_training_is_reported_with_epoch_and_rate():
    with pytest.raises(BenchmarkError, match=r"training loss: (nan|inf) in epoch 1 at a learning rate of 1e\+30"):
        run(plan=dataclasses.replace(PLAN, epochs=2, lr=1e30, optimizer="sgd", scheduler="none"))


def test_validation_loss_that_is_not_finite_is_reported(monkeypatch):
    script_validation(monkeypatch, [(50, 0.1), (50, float("nan"))])
    with pytest.raises(BenchmarkError, match="validation loss: nan in epoch 2"):
        run()


def test_non_finite_loss_ends_an_epoch_as_soon_as_the_bar_shows_it():
    seen = []

    class Counting(Batches):
        def __iter__(self):
            for part in self.parts:
                seen.append(part)
                yield part

    class Bar:
        def update(self):
            return True

        def set_postfix_str(self, text, refresh):
            assert "nan" in text

    images, labels = torch.full((6, 3, 6, 6), math.nan), torch.zeros(6).long()
    model = make_model()
    train_epoch(model, Counting(images, labels, 2), make_optimizer(model, PLAN), device=CPU, progress=Bar())
    assert len(seen) == 1


def test_batch_of_one_that_batchnorm_cannot_use_is_reported():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))
    with pytest.raises(BenchmarkError, match="training.batch_size_train"):
        run(model, train=make_data(count=9, sizes=(8, 1)))


def test_other_value_errors_are_not_hidden():
    class Broken(nn.Linear):
        def forward(self, images):
            raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        run(Broken(2, 2))


def test_interrupt_passes_through_and_puts_the_random_state_back():
    class Interrupted(Batches):
        def __iter__(self):
            yield self.parts[0]
            raise KeyboardInterrupt

    model = make_model()
    before = copy.deepcopy(model)
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    data = make_data()
    data.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        run(model, train=data)
    assert torch.equal(torch.rand(2), expected)
    assert same_weights(model, before)


def test_progress_is_shown_with_loss_accuracy_and_epoch(capsys, monkeypatch):
    monkeypatch.setattr(training, "REFRESH_SECONDS", {True: 0.0, False: 0.0})
    row = run().history[-1]
    shown = capsys.readouterr().err
    assert "test 3/3, validation" in shown and "9/9" in shown
    assert f"loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.4f}" in shown
    assert f"validation {row.validation_accuracy:.4f}" in shown


def test_plans_take_their_own_rate_and_epochs_from_the_settings():
    settings = SimpleNamespace(
        **{"epochs": 12, "lr": 0.1, "retrain_epochs": 3, "lr_retrain": 0.02, "weight_decay": 0.5, "optimizer": "sgd"},
        **{"momentum": 0.8, "scheduler": "step", "early_stopping_patience": None, "processes": 4},
    )
    dense, retrained = training.training_plan(settings), training.retraining_plan(settings)
    assert dense == FitPlan(12, 0.1, 0.5, "sgd", 0.8, "step", None, 4)
    assert retrained == FitPlan(3, 0.02, 0.5, "sgd", 0.8, "step", None, 4)


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "lion"}, {"scheduler": "linear"}, {"epochs": -1}, {"lr": 0.0}, {"lr": math.nan}, {"patience": 0},
     {"processes": 0}],
)  # fmt: skip
def test_plans_that_cannot_be_followed_are_refused(change):
    with pytest.raises(ValueError, match=str(*change.values())):
        dataclasses.replace(PLAN, **change)


def test_better_means_higher_accuracy_then_lower_loss():
    def row(accuracy, loss):
        return EpochRow(1, 0.0, 0.0, loss, accuracy, 0.1, 1.0)

    assert row(0.5, 9.0).better_than(None)
    assert row(0.6, 9.0).better_than(row(0.5, 0.1))
    assert row(0.5, 0.1).better_than(row(0.5, 0.2))
    assert not row(0.5, 0.2).better_than(row(0.5, 0.2))
    assert not row(0.4, 0.1).better_than(row(0.5, 0.2))
