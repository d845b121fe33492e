"""The one training loop: `transformers.Trainer` with Muon, checkpoints, resume and rich progress."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from qm_spec.training.optimizer import Muon


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    Attributes:
        max_steps: optimizer steps.
        batch_size: sequences per step.
        lr: Muon step of the matrices; everything else uses `adam_lr`.
        warmup_steps: linear warm-up; then constant, then linear decay over the last `decay_share`.
        save_steps: steps between checkpoints (and validations).
        seed: of initialisation and data order.
    """

    max_steps: int
    batch_size: int = 8
    lr: float = 0.02
    adam_lr: float = 3e-3
    warmup_steps: int = 20
    decay_share: float = 0.5
    save_steps: int = 100
    seed: int = 0


_SHOWN = ("loss", "eval_loss", "eval_acceptance_length")


class _Progress(TrainerCallback):
    """A rich bar with the last loss; one plain line per log where there is no terminal."""

    def __init__(self, label: str) -> None:
        self.console = Console()
        self.bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        shown = " ".join(f"{k} {v:.4g}" for k, v in kwargs.get("logs", {}).items() if k in _SHOWN)
        if shown:
            self.bar.update(self.task, loss=shown)
            if not self.console.is_terminal:
                self.console.print(f"step {state.global_step}/{state.max_steps} {shown}", highlight=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.stop()


class _StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends training after the current step, with a checkpoint to resume from."""

    def __init__(self) -> None:
        self.interrupted = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)


def fit(
    model: nn.Module,
    train: Dataset,
    valid: Dataset,
    settings: LoopSettings,
    work_dir: Path,
    label: str,
    resume: bool,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train `model` in place and return its final validation metrics.

    Args:
        model: returns an object with a `loss` when called with a batch of the data set.
        train: items are dicts of tensors.
        valid: likewise, evaluated at each checkpoint and at the end.
        settings: see `LoopSettings`.
        work_dir: holds the checkpoints (`checkpoint-<step>/`).
        label: what the progress bar says.
        resume: go on from the last checkpoint of `work_dir`, if there is one.
        compute_metrics: of the model's other outputs at validation.

    Returns:
        The metrics of the last validation, e.g. `{"eval_loss": nats per token}`.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
    """
    warmup_steps = min(settings.warmup_steps, settings.max_steps // 2)
    decay_steps = min(settings.max_steps - warmup_steps, int(settings.max_steps * settings.decay_share))
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "linear"},
        warmup_steps=warmup_steps,
        max_grad_norm=1.0,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=settings.save_steps,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    optimizer = Muon(model.named_parameters(), lr=settings.lr, adam_lr=settings.adam_lr)
    stop = _StopOnInterrupt()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=valid,
        optimizers=(optimizer, None),
        callbacks=[_Progress(label), stop],
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    checkpoint = get_last_checkpoint(str(work_dir)) if resume and work_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.interrupted:
        Console(stderr=True).print(f"stopped; the same command with --resume goes on from {work_dir}")
        raise KeyboardInterrupt
    return trainer.evaluate()
