"""Sizes of a target and of a drafter: the weights that a token passes and the bytes that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qm_spec.config import MergeConfig
from qm_spec.discovery.files import read_json

QUICKMERGE, EAGLE3 = "quickmerge", "eagle3"
DRAFTER_KINDS = (QUICKMERGE, EAGLE3)
NUM_AUX_STATES = 3
# Mass, count, level and a spare one, as float32 in every slot of our pages.
_STATE_BYTES = 16
# Keys of configs whose cost these formulas would get wrong, and why.
_REFUSED = {
    "num_experts": "its experts are read by what the router chooses",
    "num_local_experts": "its experts are read by what the router chooses",
    "n_routed_experts": "its experts are read by what the router chooses",
    "kv_lora_rank": "its keys and values are latent",
    "quantization_config": "its weights have other sizes; give the config of the model before quantisation and --dtype",
}


@dataclass(frozen=True)
class TargetShape:
    """A dense decoder with grouped-query attention over its whole context.

    Args:
        num_layers: L.
        hidden_size: D.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads.
        head_dim: d.
        intermediate_size: width of the gated MLP.
        vocab_size: V.
        max_tokens: longest sequence that the config declares; None where it names none.
        tied_head: whether the head is the embedding.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_tokens: int | None = None
    tied_head: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "tied_head" or (name == "max_tokens" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"target config: {name} must be a whole number from 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"target config: key/value heads must divide query heads, got {self.num_kv_heads} and {self.num_heads}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TargetShape:
        """Read a `config.json` in Hugging Face's names.

        Raises:
            ValueError: a size is missing, or the model is of a kind that the cost model does not describe.
        """
        config = config.get("text_config", config)
        for key, reason in _REFUSED.items():
            if config.get(key):
                raise ValueError(f"target config: a model with {key} is not simulated, because {reason}")
        others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
        if others:
            raise ValueError(f"target config: only layers of full_attention are simulated, got {', '.join(others)}")
        names = {
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_heads": "num_attention_heads",
            "intermediate_size": "intermediate_size",
            "vocab_size": "vocab_size",
        }
        missing = sorted(name for name in names.values() if name not in config)
        if missing:
            raise ValueError(
                f"target config: {', '.join(missing)} missing; pass the config.json of a model in Hugging Face format"
            )
        sizes = {name: config[key] for name, key in names.items()}
        heads = sizes["num_heads"]
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"target config: num_attention_heads must be a whole number from 1, got {heads!r}")
        return cls(
            **sizes,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or sizes["hidden_size"] // heads,
            max_tokens=config.get("max_position_embeddings"),
            tied_head=bool(config.get("tie_word_embeddings")),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        size, query, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return 2 * size * query + 2 * size * kv + 3 * size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Weights of the vocabulary head; looking an embedding up costs nothing here."""
        return self.hidden_size * self.vocab_size

    @property
    def stored_weights(self) -> int:
        """Weights in memory, the embedding apart from the head unless they are tied."""
        return self.num_layers * self.layer_weights + (1 if self.tied_head else 2) * self.head_weights

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class DrafterShape:
    """A drafter of one layer that shares the target's embedding and head.

    Args:
        kind: one of `DRAFTER_KINDS`.
        hidden_size: D, the target's.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: d.
        intermediate_size: width of the gated MLP.
        draft_vocab_size: columns of the head that it reads.
        merge: of our drafter's cache; None for EAGLE-3, which attends to all tokens.
    """

    kind: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    draft_vocab_size: int
    merge: MergeConfig | None = None

    def __post_init__(self) -> None:
        if self.kind not in DRAFTER_KINDS:
            raise ValueError(f"drafter: kind must be one of {', '.join(DRAFTER_KINDS)}, got {self.kind}")

    @classmethod
    def for_target(cls, kind: str, target: TargetShape, merge: MergeConfig | None = None) -> DrafterShape:
        """Return a drafter with the target's own head layout and MLP, and its whole vocabulary.

        Args:
            kind: one of `DRAFTER_KINDS`.
            target: that it drafts for.
            merge: of our drafter's cache; the default settings when None.
        """
        return cls(
            kind,
            target.hidden_size,
            target.num_heads,
            target.num_kv_heads,
            target.head_dim,
            target.intermediate_size,
            target.vocab_size,
            (merge or MergeConfig()) if kind == QUICKMERGE else None,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DrafterShape:
        """Read the `config.json` of a drafter folder, ours or EAGLE-3's.

        Raises:
            ValueError: a size is missing.
        """
        shape = TargetShape.from_config({**config, "layer_types": None})
        kind = QUICKMERGE if "quickmerge" in config else EAGLE3
        merge = MergeConfig.from_dict(config["quickmerge"]) if kind == QUICKMERGE else None
        drafter = cls.for_target(kind, shape, merge)
        return replace(drafter, draft_vocab_size=config.get("draft_vocab_size") or shape.vocab_size)

    @property
    def update_weights(self) -> int:
        """Weights that every verified token passes before anything is drafted."""
        fusion = NUM_AUX_STATES * self.hidden_size**2
        if self.kind == EAGLE3:
            # vLLM runs the layer on all verified tokens in the first pass.
            return fusion + self.layer_weights
        return fusion + 2 * self.hidden_size * self.num_kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of one draft pass without the head."""
        size, query, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = 3 * size * self.intermediate_size
        if self.kind == EAGLE3:
            return 2 * size * query + 4 * size * kv + query * size + mlp
        # in_proj carries the embedding into the residual stream; keys and values are made at the update.
        return 2 * size * size + 2 * size * query + query * size + mlp

    @property
    def head_weights(self) -> int:
        """Weights of the vocabulary head of one draft pass."""
        return self.hidden_size * self.draft_vocab_size

    @property
    def stored_weights(self) -> int:
        """Weights in memory; embedding and head are the target's."""
        if self.kind == EAGLE3:
            return self.update_weights
        return self.update_weights + self.layer_weights

    def attended(self, context: int) -> int:
        """Count the entries that one key/value head attends to after `context` tokens."""
        return context if self.merge is None else self.merge.entries_attended(context)

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes of one token's entry, all heads; merging does not give pages back."""
        state = _STATE_BYTES if self.kind == QUICKMERGE else 0
        return self.num_kv_heads * (2 * self.head_dim * element_bytes + state)


def load_config(path: Path) -> dict[str, Any]:
    """Return a `config.json`, given as itself or as the folder that holds it.

    Raises:
        FileNotFoundError: there is none.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"config: {path} is neither a config.json nor a folder with one")
    return read_json(file)
