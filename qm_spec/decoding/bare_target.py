"""Any causal module as the target: it has no cache, so it reads the whole prefix at each step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# What a forward may call the encoder states that it attends to.
MEMORY_NAMES = ("encoder_hidden_states", "hidden_states", "memory")


class BareTarget:
    """Calls `module(token_ids)` with `[B, T]` int64 and reads logits `[B, T, V]`, or an object with `.logits`.

    Encoder states reach the module if its forward has an argument `encoder_hidden_states`,
    `hidden_states` or `memory`, or a second argument without a default: there they go, `[B, S, D]`
    (of several layers the last). The module must be causal, which is checked at the first step:
    what stands behind a token must not change the token's logits.

    Args:
        module: the target.
        vocab_size: V.
        dim: D, width of the encoder states.
    """

    def __init__(self, module: nn.Module, vocab_size: int, dim: int) -> None:
        self.module = module
        self.vocab_size = vocab_size
        self.dim = dim
        self.memory_name, self.needs_memory = _memory_argument(module)
        self.found_causal = False

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def start(self, batch: int, capacity: int, hidden_states: Tensor | None) -> BareRun:
        """Begin a call with at most `capacity` tokens per row.

        Raises:
            TypeError: the module needs encoder states and none are given.
        """
        memory: dict[str, Tensor] = {}
        if hidden_states is None:
            if self.needs_memory:
                raise TypeError(
                    f"generate: hidden_states must be given, since the target's forward needs {self.memory_name!r}"
                )
        elif self.memory_name is not None:
            memory[self.memory_name] = hidden_states[-1] if hidden_states.ndim == 4 else hidden_states
        return BareRun(self, batch, capacity, memory)

    def logits(self, token_ids: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """Return the module's logits `[B, T, V]`.

        Raises:
            TypeError: it returns something else.
            ValueError: the shape is not `[B, T, V]`.
        """
        out: Any = self.module(token_ids, **memory)
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"generate: the target must return a tensor of logits or an object with .logits, "
                f"got {type(out).__name__}"
            )
        expected = [*token_ids.shape, self.vocab_size]
        if list(logits.shape) != expected:
            raise ValueError(f"generate: the target's logits must be [B, T, V] = {expected}, got {list(logits.shape)}")
        return logits


class BareRun:
    """The sequences of one call's rows, padded behind their ends."""

    def __init__(self, target: BareTarget, batch: int, capacity: int, memory: dict[str, Tensor]) -> None:
        self.target = target
        self.memory = memory
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=target.device)
        self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=target.device)

    def read(self, token_ids: Tensor, columns: Tensor | None = None, states: bool = True) -> tuple[Tensor, Tensor]:
        """Run the target on every row's tokens and these behind them; `keep` says which of these stay.

        Args:
            token_ids: `[B, n]` int64, any padding behind a row's own tokens.
            columns: `[B]`, the one column of each row whose logits are wanted; None wants all.
            states: has no effect.

        Returns:
            logits `[B, n, V]`, or `[B, 1, V]` at `columns`; no states, `[B, n, 0]`.

        Raises:
            ValueError: the target is not causal.
        """
        num_new = token_ids.shape[1]
        place = self.lengths.unsqueeze(1) + torch.arange(num_new, device=token_ids.device)
        # A row with fewer tokens left than others may have padding behind the buffer's end.
        within = place < self.tokens.shape[1]
        row, column = within.nonzero(as_tuple=True)
        self.tokens[row, place[row, column]] = token_ids[row, column]
        end = min(int(self.lengths.max()) + num_new, self.tokens.shape[1])
        every = self.target.logits(self.tokens[:, :end], self.memory)
        if num_new > 1 and columns is None and not self.target.found_causal:
            self._check_causal(every)
        wanted = place if columns is None else place.gather(1, columns.unsqueeze(1))
        index = wanted.clamp_max(end - 1).unsqueeze(-1).expand(-1, -1, every.shape[-1])
        return every.gather(1, index), every.new_empty(*token_ids.shape, 0)

    def keep(self, counts: Tensor) -> None:
        """Keep the first `counts` `[B]` of the tokens just read."""
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.lengths, self.tokens = self.lengths[rows], self.tokens[rows]
        self.memory = {name: states[rows] for name, states in self.memory.items()}

    def _check_causal(self, every: Tensor) -> None:
        """Compare the logits after the shortest row's verified tokens with those that drafts stand behind."""
        row = int(self.lengths.argmin())
        seen = int(self.lengths[row]) + 1
        memory = {name: states[row : row + 1] for name, states in self.memory.items()}
        alone = self.target.logits(self.tokens[row : row + 1, :seen], memory)[0, -1].float()
        difference = (alone - every[row, seen - 1].float()).abs().max()
        # Kernels for other lengths round otherwise; half the digits of the dtype are left for that.
        tolerance = torch.finfo(every.dtype).eps ** 0.5 * alone.abs().max().clamp_min(1)
        if not bool(difference <= tolerance):
            raise ValueError(
                "generate: the target must be causal, but its logits after a token change with the tokens behind it "
                f"(by {float(difference):.2g}); mask its attention to later tokens"
            )
        self.target.found_causal = True


def _memory_argument(module: nn.Module) -> tuple[str | None, bool]:
    """Return the name of the argument that takes encoder states, and whether the module needs them."""
    parameters = inspect.signature(module.forward).parameters
    for name in MEMORY_NAMES:
        if name in parameters:
            return name, parameters[name].default is inspect.Parameter.empty
    named = [one for one in parameters.values() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(named) > 1 and named[1].default is inspect.Parameter.empty:
        return named[1].name, True
    return None, False
