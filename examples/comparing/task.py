"""What every training shares, and what is measured of one."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsefx.sparsifiers import Sparsifier
from sparsefx.sparsifiers.vrpge import CompactStep

BATCH = 64
SIZE = 64 * 304 + 304 * 104 + 104 * 10  # weights


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        accuracy: percent.
        step_ms: median of forward, backward and optimizer.
        masks_ms: mean a step of all that is done for masks.
        macs: by role, of a step, as executed.
        left: of a step, that masks leave, whether executed or not.
        serving: of the forward of the trained net on one batch, as executed.
        density: share of the weights that are kept.
        seconds: of the whole training, as median steps and masks add up.
    """

    accuracy: float
    step_ms: float
    masks_ms: float
    macs: dict[str, float]
    left: float
    serving: float
    density: float
    seconds: float

    @property
    def executed(self) -> float:
        """All three products together."""
        return sum(self.macs.values())


@dataclass
class Task:
    """The data, what every training shares, and how long its parts took."""

    seed: int
    epochs: int
    codegen: str
    steps: list[float] = field(default_factory=list)
    masks: float = 0.0
    counted: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        x, y = load_digits(return_X_y=True)
        parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
        self.x, self.x_test = (torch.tensor(p, dtype=torch.float32) for p in parts[:2])
        self.y, self.y_test = (torch.tensor(p) for p in parts[2:])
        self.every = len(self.x) // BATCH
        self.total = self.every * self.epochs
        torch.manual_seed(self.seed)
        self.model = nn.Sequential(
            nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
        )

    def sgd(self, parameters: Any = None, lr: float = 0.05) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters or self.model.parameters(), lr, momentum=0.9)

    def fit(
        self, optimizer: torch.optim.Optimizer, run: Callable[[Tensor], Tensor],
        sparsifier: Sparsifier[Any] | None = None, before: Callable[..., object] | None = None,
    ) -> None:  # fmt: skip
        """Train; ``before`` is what a method does with a batch ahead of the step."""
        for _ in range(self.epochs):
            if isinstance(run, CompactStep):
                self.count(run)
            for rows in torch.randperm(len(self.x))[: len(self.x) // BATCH * BATCH].split(BATCH):
                x, y = self.x[rows], self.y[rows]
                if before:
                    self.timed(before, lambda x=x, y=y: F.cross_entropy(self.model(x), y))
                began = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(run(x), y)
                (loss + sparsifier.loss() if sparsifier else loss).backward()
                optimizer.step()
                self.steps.append(time.perf_counter() - began)
                if sparsifier:
                    self.timed(sparsifier.step)

    def timed(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what is for masks alone."""
        began = time.perf_counter()
        done = work(*args)
        self.masks += time.perf_counter() - began
        return done

    def count(self, run: Callable[[Tensor], Tensor]) -> None:
        """Count the operations of one eager step, (forward, backward), and leave no gradients."""
        with FlopCounterMode(display=False) as counter:
            loss = F.cross_entropy(run(self.x[:BATCH]), self.y[:BATCH])
            forward = counter.get_total_flops()
            loss.backward()
        self.counted.append((forward, counter.get_total_flops() - forward))
        self.model.zero_grad()

    def result(
        self, macs: dict[str, float], left: float, kept: int | None = None,
        net: nn.Module | None = None,
    ) -> Run:  # fmt: skip
        """Evaluate ``net``, by default the model, of which so many weights are kept."""
        net = (net or self.model).eval()
        with torch.no_grad():
            right = (net(self.x_test).argmax(1) == self.y_test).double().mean().item()
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
        held = sum(w.numel() for w in weights)
        median = statistics.median(self.steps)
        return Run(
            accuracy=100 * right,
            step_ms=1e3 * median,
            masks_ms=1e3 * self.masks / self.total,
            macs=macs,
            left=left,
            serving=BATCH * held,
            density=(sum(int(w.count_nonzero()) for w in weights) if kept is None else kept) / SIZE,
            seconds=median * len(self.steps) + self.masks,
        )
