"""A Llama-like target that reads a prompt once, and writes behind it with its attention to the prompt restricted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from far_attention import SAMPLED, Layer, Rule, attend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qm_spec.compression.rotary import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512


class RestrictedTarget:
    """A target and the keys and values of the text that it has read, in float32.

    Args:
        model: a causal transformers model with Llama's layers.
        capacity: tokens of the longest text.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        config: Any = model.config
        self._model: Any = model
        self._rotary = Rotary.from_model(model)
        self._groups, self._dim = config.num_key_value_heads, config.head_dim
        self._repeats = config.num_attention_heads // self._groups
        shape = (config.num_hidden_layers, self._groups, capacity, self._dim)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._queries = [torch.zeros(0)] * config.num_hidden_layers

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int], start: int, sample: bool = False) -> int:
        """Read tokens from position `start` on, together; what stood there is overwritten.

        Args:
            token_ids: one or more.
            start: position of the first.
            sample: whether rules are to know their queries.

        Returns:
            The most likely token behind them.
        """
        stop = start + len(token_ids)
        position = torch.arange(start, stop)
        visible = torch.arange(stop) <= position[:, None]
        hidden = self._model.model.embed_tokens(torch.tensor(token_ids))
        for number, block in enumerate(self._model.model.layers):
            queries, keys, values = self._project(block, hidden, position)
            self._keys[number, :, start:stop] = keys
            self._values[number, :, start:stop] = values
            if sample:
                # As if asked right behind the text.
                self._queries[number] = self._rotary.rotate(queries, stop - position).flatten(1, 2)
            seen = scaled_dot_product_attention(
                queries.flatten(1, 2)[None],
                self._keys[None, number, :, :stop],
                self._values[None, number, :, :stop],
                visible.repeat(self._repeats, 1),
            )
            hidden = self._finish(block, hidden, seen[0].unflatten(1, (self._repeats, -1)))
        return int(self._tokens(hidden[-1:])[0])

    def prefill(self, prompt: Sequence[int]) -> None:
        """Read a prompt but its last token.

        Its last tokens are one chunk, so that their queries are known together.
        """
        stop = len(prompt) - 1
        last = max(0, stop - SAMPLED)
        for begin in range(0, last, CHUNK):
            self.read(prompt[begin : min(begin + CHUNK, last)], begin)
        self.read(prompt[last:stop], last, sample=True)

    def write(self, last: int, start: int, num_tokens: int, end: int | None) -> list[int]:
        """Write greedily behind `last`, which stands at `start`, up to the token `end`."""
        answer: list[int] = []
        token = last
        while len(answer) < num_tokens and token != end:
            token = self.read([token], start + len(answer))
            answer.append(token)
        return answer

    @torch.inference_mode()
    def predict(self, token_ids: Sequence[int], start: int, rules: Sequence[Rule]) -> list[list[int]]:
        """Return what the target takes for most likely behind each of T tokens, for each rule.

        Args:
            token_ids: the prompt's last token and the answer but its last, already read.
            start: position of the first, and the number of prompt tokens that rules restrict.
            rules: what rows see of the prompt in each layer.
        """
        stop = start + len(token_ids)
        position = torch.arange(start, stop)
        hidden = self._model.model.embed_tokens(torch.tensor(token_ids)).repeat(len(rules), 1, 1)
        for number, block in enumerate(self._model.model.layers):
            queries, keys, values = self._project(block, hidden, position)
            layer = Layer(
                self._keys[number, :, :start], self._values[number, :, :start], self._queries[number], self._rotary
            )
            between = self._keys[number, :, start:stop], self._values[number, :, start:stop]
            seen = [
                attend(queries[place], rule(layer), *between, (keys[place], values[place]))
                for place, rule in enumerate(rules)
            ]
            hidden = self._finish(block, hidden, torch.stack(seen))
        return [self._tokens(rows).tolist() for rows in hidden]

    def _project(self, block: Any, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[..., G, R, T, D]`, keys and values `[..., G, T, D]` of `[..., T, H]`, both rotated."""
        attention, normed = block.self_attn, block.input_layernorm(hidden)

        def heads(projection: Any) -> Tensor:
            return projection(normed).unflatten(-1, (-1, self._dim)).transpose(-2, -3)

        queries = self._rotary.rotate(heads(attention.q_proj), position)
        keys = self._rotary.rotate(heads(attention.k_proj), position)
        return queries.unflatten(-3, (self._groups, self._repeats)), keys, heads(attention.v_proj)

    @staticmethod
    def _finish(block: Any, hidden: Tensor, seen: Tensor) -> Tensor:
        """Return the layer's output `[..., T, H]` from its attention `[..., G, R, T, D]`."""
        rows = seen.flatten(-4, -3).transpose(-2, -3).flatten(-2)
        hidden = hidden + block.self_attn.o_proj(rows)
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    def _tokens(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head(self._model.model.norm(hidden)).argmax(-1)
