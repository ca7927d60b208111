"""One loop, `fit`, for the training of the dense model and for every retraining after pruning."""

import copy
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from errors import BenchmarkError
from helpers import derive_seed
from parallel import Crew, in_processes

log = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "step", "none")
STEP_MILESTONES = (0.5, 0.75)  # shares of the run after which `step` divides by 10; He et al., CVPR 2016, section 4.2
REFRESH_SECONDS = {True: 0.2, False: 10.0}  # between two drawings of the progress bar, on a terminal and in a log file


@dataclass(frozen=True)
class FitPlan:
    """How to train. patience: epochs without a better validation result before stopping; None never stops early.
    processes: of this machine, which share each batch.

    Raises ValueError for values that cannot be trained with.
    """

    epochs: int
    lr: float
    weight_decay: float
    optimizer: str
    momentum: float
    scheduler: str
    patience: int | None
    processes: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS or self.scheduler not in SCHEDULES:
            raise ValueError(f"{self.optimizer!r} must be of {OPTIMIZERS}, {self.scheduler!r} of {SCHEDULES}")
        if self.epochs < 0 or not 0 < self.lr < math.inf or (self.patience is not None and self.patience < 1):
            raise ValueError(f"epochs must be >= 0, lr positive, patience None or >= 1: {self}")
        if self.processes < 1:
            raise ValueError(f"processes must be >= 1: {self}")


@dataclass(frozen=True)
class EpochRow:
    """What one epoch came to. Losses are means per image, in nats; accuracies are fractions of images.

    epoch counts from 1; lr is that of the epoch's first step; seconds include validation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    lr: float
    seconds: float

    def better_than(self, other: "EpochRow | None") -> bool:
        """Higher validation accuracy, or the same and a lower validation loss."""
        if other is None:
            return True
        mine = (self.validation_accuracy, -self.validation_loss)
        return mine > (other.validation_accuracy, -other.validation_loss)


@dataclass(frozen=True)
class FitResult:
    """A trained copy with the weights of `best_epoch` (0: none was trained), in eval mode; seconds of the whole fit."""

    model: nn.Module
    history: list[EpochRow]
    best_epoch: int
    seconds: float


class Tally:
    """Sums over the images seen so far, held on the device: reading them, not adding to them, waits for the device."""

    def __init__(self, device: torch.device):
        self.images = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (a scalar), logits [B, classes], labels [B]."""
        self.images += len(labels)
        self._loss += loss.detach().double() * len(labels)
        self._correct += (logits.detach().argmax(1) == labels).sum()

    def over(self, crew: Crew) -> "Tally":
        """The sums of all processes."""
        total = Tally(self._loss.device)
        total.images = int(crew.summed(torch.tensor(self.images, device=self._loss.device)))
        total._loss, total._correct = crew.summed(self._loss.clone()), crew.summed(self._correct.clone())
        return total

    @property
    def loss(self) -> float:
        """Mean loss of an image; not finite from the first batch on whose loss was not."""
        return self._loss.item() / self.images

    @property
    def accuracy(self) -> float:
        """Correctly classified images over images seen."""
        return self._correct.item() / self.images


def training_plan(training: Any) -> FitPlan:
    """The plan of the dense model's training, out of the settings under `training`."""
    shared = {name: getattr(training, name) for name in ("weight_decay", "optimizer", "momentum", "scheduler")}
    own = {"patience": training.early_stopping_patience, "processes": training.processes}
    return FitPlan(training.epochs, training.lr, **shared, **own)


def retraining_plan(training: Any) -> FitPlan:
    """The plan of a pruned model's retraining: its own epochs and learning rate, all else as in training."""
    return replace(training_plan(training), epochs=training.retrain_epochs, lr=training.lr_retrain)


def fit(
    model: nn.Module,
    train_loader: Any,
    validation_loader: Any,
    plan: FitPlan,
    *,
    device: torch.device,
    description: str,
    seed: int,
) -> FitResult:
    """Train a copy of `model` on `device` and return it with the weights of its best validation epoch.

    The loaders yield images [B, 3, H, W] and labels [B] that index the model's logits; `train_loader` also has
    `set_epoch`. The argument, the global random state and the disk are left as they were, so that an interrupt leaves
    nothing behind. On one machine the result is a function of the arguments, bit for bit (on CUDA as far as cuDNN's
    deterministic algorithms reach).

    With `plan.processes` above 1, processes that end with it take an equal part of every batch each, on a device each,
    counted from `device`; the loaders then need `part`, see `BatchLoader`. Gradients and BatchNorm's statistics are
    those of the whole batch: up to rounding, and to what dropout draws, the result is that of one process.

    Raises BenchmarkError when a loss is not finite, and for a batch of one image that BatchNorm cannot train on.
    """
    start = time.perf_counter()
    best = copy.deepcopy(model).to(device)
    if plan.epochs == 0:
        return FitResult(best.eval(), [], 0, time.perf_counter() - start)
    if plan.processes == 1:
        history = _trained(Crew(device), best, train_loader, validation_loader, plan, description, seed)
    else:
        cpu = torch.device("cpu")
        train_loader.part(0, plan.processes, cpu)  # raises where a batch is too small, before any process is started
        loaders = [loader.part(0, 1, cpu) for loader in (train_loader, validation_loader)]
        work = copy.deepcopy(model).to(cpu), *loaders, plan, description, seed
        found = in_processes(_trained_together, work, processes=plan.processes, device=device)
        best.load_state_dict(found["state"])
        history = [EpochRow(**row) for row in found["history"]]
    best_epoch = _best(history).epoch
    if len(history) < plan.epochs:
        log.info("%s: stopped early, nothing better on validation since epoch %d", description, best_epoch)
    return FitResult(best.eval(), history, best_epoch, time.perf_counter() - start)


def _trained(
    crew: Crew, best: nn.Module, train_loader: Any, validation_loader: Any, plan: FitPlan, description: str, seed: int
) -> list[EpochRow]:
    """What each epoch came to; `best`, on the crew's device, is changed to the network of the best of them."""
    working = crew.replica(copy.deepcopy(best).to(memory_format=torch.channels_last))
    trained_model = working if crew.alone else working.module
    optimizer = make_optimizer(working, plan)
    scaler = torch.amp.GradScaler(crew.device.type, enabled=_autocast_dtype(crew.device) is torch.float16)
    history: list[EpochRow] = []
    best_row: EpochRow | None = None
    seed = seed if crew.rank == 0 else derive_seed(seed, f"process {crew.rank}")
    bar = _progress_bar(plan.epochs * len(train_loader), description, shown=crew.rank == 0)
    with _reproducible(seed, crew.device), bar:
        for epoch in range(1, plan.epochs + 1):
            epoch_start = time.perf_counter()
            rate = _rate(plan, epoch, len(train_loader))
            train_loader.set_epoch(epoch)
            options = {"device": crew.device, "rate": rate, "scaler": scaler, "progress": bar, "crew": crew}
            trained = train_epoch(working, train_loader, optimizer, **options)
            validated = validate(trained_model, validation_loader, crew.device).over(crew)
            row = _row(epoch, trained.over(crew), validated, rate(0), time.perf_counter() - epoch_start)
            history.append(row)
            bar.set_postfix_str(_shown(trained), refresh=False)
            bar.set_description(f"{description} {epoch}/{plan.epochs}, validation {row.validation_accuracy:.4f}")
            if row.better_than(best_row):
                best_row = row
                best.load_state_dict(trained_model.state_dict())  # copied into the argument's own memory layout
            elif plan.patience is not None and epoch - best_row.epoch >= plan.patience:
                bar.total = bar.n
                break
    return history


def _trained_together(
    crew: Crew, model: nn.Module, train_loader: Any, validation_loader: Any, plan: FitPlan, description: str, seed: int
) -> dict[str, Any]:
    """`_trained` as one of several processes, each with its part of the batches."""
    loaders = [loader.part(crew.rank, crew.size, crew.device) for loader in (train_loader, validation_loader)]
    best = model.to(crew.device)
    history = _trained(crew, best, *loaders, plan, description, seed)
    state = {name: value.cpu() for name, value in best.state_dict().items()}
    return {"state": state, "history": [asdict(row) for row in history]}


def _best(history: Sequence[EpochRow]) -> EpochRow:
    best = None
    for row in history:
        best = row if row.better_than(best) else best
    return best


def train_epoch(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    rate: Callable[[int], float] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    progress: tqdm | None = None,
    crew: Crew | None = None,
) -> Tally:
    """One pass over `loader` in train mode, changing `model` and `optimizer`; returns its sums of loss and accuracy,
    those of this process's part of the images where a `crew` shares them.

    rate: step of this epoch, from 0 -> learning rate; None leaves the optimizer's. progress: a bar that counts batches.
    Ends early, with a loss that is not finite, once that is seen; it is looked for whenever the bar is redrawn.
    Raises BenchmarkError for a batch of one image where BatchNorm needs more.
    """
    model.train()
    crew = crew or Crew(device)
    tally = Tally(device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)  # disabled, it passes everything through
    dtype = _autocast_dtype(device)
    for step, (images, labels) in enumerate(loader):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = _forward(model, images)
            loss = cross_entropy(logits, labels)
        scaler.scale(crew.weighted(loss, len(labels))).backward()
        scaler.step(optimizer)
        scaler.update()
        tally.add(loss, logits, labels)
        if progress is not None and progress.update():
            progress.set_postfix_str(_shown(tally), refresh=False)
            if crew.alone and not math.isfinite(tally.loss):  # of a crew, none may stop while others go on
                break
    return tally


def make_optimizer(model: nn.Module, plan: FitPlan) -> torch.optim.Optimizer:
    """The plan's optimizer over the model's trainable parameters.

    Fused: the same update in one pass over the weights, which differs from the unfused one by rounding alone. SGD's
    momentum is Nesterov's.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": plan.lr, "weight_decay": plan.weight_decay, "fused": True}
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=plan.momentum, nesterov=plan.momentum > 0, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.optimizer](parameters, **options)


def rate_factor(scheduler: str, progress: float) -> float:
    """What the learning rate is multiplied by after a share `progress` of all steps, in [0, 1]."""
    if scheduler == "cosine":  # Loshchilov and Hutter, ICLR 2017, equation 5, without restarts
        return (1 + math.cos(math.pi * progress)) / 2
    if scheduler == "step":
        return 0.1 ** sum(progress >= milestone for milestone in STEP_MILESTONES)
    return 1.0


def validate(model: nn.Module, loader: Any, device: torch.device) -> Tally:
    """Sums of loss and accuracy over `loader` in eval mode and full precision; the model is left in eval mode."""
    model.eval()
    tally = Tally(device)
    with torch.inference_mode():
        for images, labels in loader:
            logits = model(images.to(device, memory_format=torch.channels_last, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            tally.add(cross_entropy(logits, labels), logits, labels)
    return tally


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BenchmarkError(
            "training.batch_size_train: a batch holds a single image, which BatchNorm cannot train on; use 2 or more"
        ) from error


def _rate(plan: FitPlan, epoch: int, steps: int) -> Callable[[int], float]:
    """Step of this epoch, from 0 -> learning rate; schedules advance with every step, not with every epoch."""
    return lambda step: plan.lr * rate_factor(plan.scheduler, ((epoch - 1) * steps + step) / (plan.epochs * steps))


def _row(epoch: int, trained: Tally, validated: Tally, lr: float, seconds: float) -> EpochRow:
    for part, tally in (("training", trained), ("validation", validated)):
        if not math.isfinite(tally.loss):
            raise BenchmarkError(
                f"{part} loss: {tally.loss} in epoch {epoch} at a learning rate of {lr:.3g}; "
                "use a lower one (training.lr, or training.lr_retrain for retraining)"
            )
    return EpochRow(epoch, trained.loss, trained.accuracy, validated.loss, validated.accuracy, lr, seconds)


def _shown(tally: Tally) -> str:
    return f"loss {tally.loss:.4f}, accuracy {tally.accuracy:.4f}"


def _progress_bar(steps: int, description: str, shown: bool) -> tqdm:
    """A bar on stderr, that of the moment: redrawn often on a terminal, seldom where each drawing adds to a log."""
    refresh = REFRESH_SECONDS[sys.stderr.isatty()]
    return tqdm(
        total=steps, desc=description, unit="batch", mininterval=refresh, dynamic_ncols=True, file=sys.stderr,
        disable=not shown,
    )  # fmt: skip


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the GPU computes in it, else float16, whose gradients need scaling; None on the CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def _reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout and the like seeded, cuDNN deterministic; afterwards generators and flags are as they were."""
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    cuda = device.type == "cuda"
    index = device.index if device.index is not None or not cuda else torch.cuda.current_device()
    with torch.random.fork_rng(devices=[index] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = flags
