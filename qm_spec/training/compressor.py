"""Training of the compressor alone, on a frozen target's states of real text."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalPrediction

from qm_spec import provenance
from qm_spec.quickmerge import QuickMergePP, TemperatureSchedule
from qm_spec.training.data import TokenWindows, find_files, read_documents, sha256_of, tokenize
from qm_spec.training.fit import explained_full_disk, fit
from qm_spec.training.settings import CompressorSettings

LOSSES = ("alignment", "fidelity", "total")
VALID_TOKENS = 8192
# Windows from which the scale of the states is taken.
SCALE_WINDOWS = 8


class CompressorTraining(nn.Module):
    """The compressor behind its frozen target: one call reads text and compresses a layer's states of it.

    Args:
        compressor: trained; its K is `k_max`.
        target: frozen, any causal LM of transformers that returns its hidden states.
        layer: 0 = the embeddings, i = the states after layer i.
        alpha: weight of the alignment loss.
        schedule: of the selection's temperature, by training steps.
    """

    step: Tensor

    def __init__(
        self,
        compressor: QuickMergePP,
        target: PreTrainedModel,
        layer: int,
        alpha: float = 0.1,
        schedule: TemperatureSchedule | None = None,
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.layer = layer
        self.alpha = alpha
        self.schedule = schedule or TemperatureSchedule()
        # In the checkpoints, so that a resumed run goes on at its temperature.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        target.requires_grad_(False).eval()
        # In a tuple it is no submodule: checkpoints hold what is trained and nothing else.
        self._target = (target,)

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        return self._target[0].device

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return `loss`, and each loss of the compressor by name, `[B]` float32, the same in each row.

        Args:
            input_ids: `[B, N]` int64.
            labels: ignored; the states are their own label.
        """
        selection = self.compressor.merging.selection
        selection.temperature = self.schedule(int(self.step) if self.training else self.schedule.num_steps)
        if self.training:
            self.step += 1
        states = read_states(self._target[0], input_ids, self.layer)
        _, losses = self.compressor(states, alpha=self.alpha)
        rows = {name: losses[name].detach().expand(len(input_ids)) for name in LOSSES}
        return {"loss": losses["total"], **rows}


@torch.no_grad()
def read_states(target: PreTrainedModel, input_ids: Tensor, layer: int) -> Tensor:
    """Return the target's states `[B, N, D]` float32 after `layer` layers; 0 = its embeddings."""
    if layer == 0:
        return target.get_input_embeddings()(input_ids).float()
    return (
        target.base_model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[layer].float()
    )


def _mean_losses(prediction: EvalPrediction) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in zip(LOSSES, prediction.predictions, strict=True)}


def _load_target(folder: Path, layer: int) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"compress-train: {folder} holds no config.json; pass the folder of a transformers causal LM"
        )
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_layers = target.config.num_hidden_layers
    if not 0 <= layer <= num_layers:
        raise ValueError(f"compress-train: layer must be in 0..{num_layers} (0 = the embeddings), got {layer}")
    # Models of transformers run as many layers as their config says now. One more than is read, because the
    # states of the last one are normalised.
    target.config.num_hidden_layers = min(num_layers, layer + 1)
    return target.cuda() if torch.cuda.is_available() else target


def train_compressor(settings: CompressorSettings) -> dict[str, Any]:
    """Train a compressor of the target's states, save it under `out`, return this stage's provenance.

    `QuickMergePP.from_pretrained` loads it; checkpoints are kept in `out/checkpoints`. The last 2 % of the tokens, but
    at most 8192, are kept for validation.

    Raises:
        FileNotFoundError: target or data missing.
        ValueError: a layer the target does not have, or too little text.
    """
    started, commit = time.time(), provenance.git_commit()
    set_seed(settings.seed)
    files = find_files(settings.data)
    target = _load_target(settings.target, settings.layer)
    token_ids = tokenize(AutoTokenizer.from_pretrained(settings.target), read_documents(files))
    num_valid = max(settings.sequence_length, min(VALID_TOKENS, len(token_ids) // 50))
    valid_set = TokenWindows(token_ids[-num_valid:], settings.sequence_length)
    train_set = TokenWindows(token_ids[:-num_valid], settings.sequence_length)
    compressor = QuickMergePP(
        dim=target.config.hidden_size,
        k_max=settings.keep,
        input_scale=_scale_of_states(target, train_set, settings.layer),
        chunk_size=settings.chunk_size,
        grouping=settings.grouping,
        saliency=settings.saliency,
        causal=settings.causal,
        prior_layers=settings.prior_layers,
        gamma=settings.gamma,
    )
    num_steps = max(1, 3 * settings.max_steps // 4)
    schedule = TemperatureSchedule(settings.start_temperature, settings.temperature, num_steps)
    model = CompressorTraining(compressor, target, settings.layer, settings.alpha, schedule)
    before = _validate(model, valid_set, settings.batch_size)
    work = settings.out / "checkpoints"
    metrics = fit(model, train_set, valid_set, settings, work, "compressor", _mean_losses)
    with explained_full_disk(settings.out):
        compressor.save_pretrained(settings.out)
    stage = {
        "command": provenance.command(),
        "commit": commit,
        "target_sha256": sha256_of([settings.target / "config.json", *sorted(settings.target.glob("*.safetensors"))]),
        "layer": settings.layer,
        "data_sha256": sha256_of(files),
        "seed": settings.seed,
        "steps": settings.max_steps,
        "windows": settings.max_steps * settings.batch_size,
        "sequence_length": settings.sequence_length,
        "kept_per_window": settings.keep,
        "alpha": settings.alpha,
        "valid_before": before,
        "valid_after": {name: metrics[f"eval_{name}"] for name in LOSSES},
        # Of one run from its beginning to its end; a resumed one has no single time.
        "wall_hours": None if settings.resume else round((time.time() - started) / 3600, 2),
        "versions": provenance.versions(),
    }
    provenance.write_stage(settings.out, stage)
    shutil.rmtree(work)
    return stage


def _scale_of_states(target: PreTrainedModel, windows: TokenWindows, layer: int) -> float:
    """Return the root mean square of the states' values, to three digits, over evenly spread windows."""
    stride = max(1, len(windows) // SCALE_WINDOWS)
    ids = torch.stack([windows[i]["input_ids"] for i in range(0, len(windows), stride)][:SCALE_WINDOWS])
    return float(f"{read_states(target, ids.to(target.device), layer).square().mean().sqrt():.3g}")


@torch.no_grad()
def _validate(model: CompressorTraining, windows: TokenWindows, batch_size: int) -> dict[str, float]:
    """Return the mean of each loss over the windows, in eval mode."""
    model.eval()
    sums = dict.fromkeys(LOSSES, 0.0)
    model.to(model.device)
    for start in range(0, len(windows), batch_size):
        ids = torch.stack([windows[i]["input_ids"] for i in range(start, min(start + batch_size, len(windows)))])
        for name, values in model(ids.to(model.device)).items():
            if name in sums:
                sums[name] += values.sum().item()
    model.train()
    return {name: value / len(windows) for name, value in sums.items()}
