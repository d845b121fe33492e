"""Muon for matrices and AdamW for the rest, in one optimizer, in the parameters' own dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients (Jordan et al. 2024, "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    Args:
        matrices: `[n, rows, cols]`, any float dtype.
        steps: Newton-Schulz iterations.

    Returns:
        A new tensor of the same shape and dtype.

    Source: Jordan et al. 2024. They multiply in bfloat16, and so do we where the processor can; one without such
    instructions takes ten times as long for it as for float32.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if x.dtype == torch.float32 and _multiplies_bfloat16(x.device):
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices; AdamW for embeddings, heads and vectors.

    Args:
        named_parameters: the model's `named_parameters()`; frozen ones are left out.
        lr: step of the matrices, in units of the spectral norm.
        adam_lr: step of everything else.
        weight_decay: decoupled, matrices only.
        momentum: of the matrices, Nesterov.
        betas: AdamW's.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 0.02,
        adam_lr: float = 3e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                is_table = "embed" in name or "lm_head" in name
                (rest if parameter.ndim != 2 or is_table else matrices).append(parameter)
        groups = [
            {"params": matrices, "lr": lr, "kind": "muon"},
            {"params": rest, "lr": adam_lr, "kind": "adam"},
        ]
        defaults = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_matrices(group)
            else:
                self._step_adam(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        # Equal shapes are stacked: one batched product costs less than twenty small ones.
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                gradient, state = parameter.grad, self.state[parameter]
                assert gradient is not None
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(state["momentum"], group["momentum"]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)

    def _step_adam(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["mean"].lerp_(parameter.grad, 1 - beta1)
            state["square"].lerp_(parameter.grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["step"])
            square = state["square"] / (1 - beta2 ** state["step"])
            parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-group["lr"])
