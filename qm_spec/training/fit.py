"""The one training loop: `transformers.Trainer` with Muon, checkpoints, resume and rich progress."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction

from qm_spec.training.optimizer import Muon
from qm_spec.training.settings import LoopSettings

# Steps whose time is taken for that of the others: the first ones start slowly.
_ESTIMATE_AFTER = 5


# Beside the folder of the checkpoints.
LOG = "train.log"
_SHOWN = ("loss", "eval_loss", "eval_acceptance_length")


class _Progress(TrainerCallback):
    """A rich bar with speed, time left and the last losses; plain lines where there is no terminal, and in a file.

    Args:
        label: of the bar.
        log: file that the lines are added to.
        tokens_per_step: that a step learns from; None where they are not counted.
    """

    def __init__(self, label: str, log: Path, tokens_per_step: float | None) -> None:
        self.console, self.log, self.tokens_per_step = Console(), log, tokens_per_step
        self.bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first, self.began = state.global_step, time.monotonic()
        self.bar.start()
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, shown="")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step == self.first + _ESTIMATE_AFTER:
            self._say(f"about {self._left(state)} left")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        shown = " ".join(f"{k} {v:.4g}" for k, v in kwargs.get("logs", {}).items() if k in _SHOWN)
        # Also called once before the first step, and once more behind the last.
        if not shown or state.global_step == self.first:
            return
        if self.tokens_per_step is not None:
            shown += f", {self.tokens_per_step * self._steps_per_s(state):.0f} tokens/s"
        self.bar.update(self.task, shown=shown)
        self._say(f"step {state.global_step}/{state.max_steps} {shown}, {self._left(state)} left")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.stop()

    def _steps_per_s(self, state: TrainerState) -> float:
        return (state.global_step - self.first) / max(1e-9, time.monotonic() - self.began)

    def _left(self, state: TrainerState) -> str:
        seconds = (state.max_steps - state.global_step) / self._steps_per_s(state)
        return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, highlight=False)
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


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


class _Epochs(TrainerCallback):
    """Tells a data set that chooses anew in each epoch which one begins, or goes on after a resume."""

    def __init__(self, data: Dataset[dict[str, Tensor]]) -> None:
        self.begin_epoch = getattr(data, "begin_epoch", lambda number: None)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begin_epoch(int(state.epoch or 0))


def _only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (batch,) = items
    return batch


def last_checkpoint(work_dir: Path) -> str | None:
    """Return the newest whole checkpoint of a folder, None where there is none; a full disk or a crash cuts one off."""
    steps = sorted(
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in work_dir.glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdecimal()
    )
    for _, folder in reversed(steps):
        try:
            # Written last.
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, ValueError):
            continue
    return None


# What the libraries say that write weights and the optimizer's state, none of them by an OSError.
_DISK_FULL = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter", "inline_container")


@contextmanager
def explained_full_disk(folder: Path) -> Iterator[None]:
    """Raise an OSError with the way out where a model or a checkpoint below `folder` cannot be written."""
    try:
        yield
    except Exception as error:
        if any(part in str(error) for part in _DISK_FULL):
            reason = str(error).partition("\n")[0]
            raise OSError(
                f"train: a file in {folder} could not be written ({reason}); free some space, and the same command "
                "with --resume goes on from the last whole checkpoint"
            ) from error
        raise


def fit(
    model: nn.Module,
    train: Dataset[dict[str, Tensor]],
    valid: Dataset[dict[str, Tensor]],
    settings: LoopSettings,
    work_dir: Path,
    label: str,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    whole_batches: bool = False,
    tokens_per_step: float | None = None,
) -> dict[str, float]:
    """Train `model` in place and return its final validation metrics.

    Args:
        model: returns an object with a `loss` when called with a batch of the data set.
        train: items are dicts of tensors.
        valid: likewise, evaluated at each checkpoint and at the end.
        settings: see `LoopSettings`; to resume goes on from the last checkpoint of `work_dir`, if there is one.
        work_dir: holds the checkpoints (`checkpoint-<step>/`); beside it `train.log` has a line of every ten steps.
        label: what the progress bar says.
        compute_metrics: of the model's other outputs at validation.
        whole_batches: an item of the data sets is a batch already.
        tokens_per_step: that a step learns from, for the progress; None leaves the speed out.

    Returns:
        The metrics of the last validation, e.g. `{"eval_loss": nats per token}`.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        OSError: the disk is full.
    """
    assert settings.max_steps, "settings are fitted to the data first"
    work_dir.mkdir(parents=True, exist_ok=True)
    warmup_steps = min(settings.warmup_steps, settings.max_steps // 2)
    decay_steps = min(settings.max_steps - warmup_steps, int(settings.max_steps * settings.decay_share))
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1 if whole_batches else settings.batch_size,
        per_device_eval_batch_size=1 if whole_batches else settings.batch_size,
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
        callbacks=[_Progress(label, work_dir.parent / LOG, tokens_per_step), _Epochs(train), stop],
        compute_metrics=compute_metrics,
        data_collator=_only_item if whole_batches else None,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    with explained_full_disk(work_dir):
        trainer.train(resume_from_checkpoint=last_checkpoint(work_dir) if settings.resume else None)
    if stop.interrupted:
        Console(stderr=True).print(f"stopped; the same command with --resume goes on from {work_dir}")
        raise KeyboardInterrupt
    return trainer.evaluate()
