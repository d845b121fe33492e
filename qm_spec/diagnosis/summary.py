"""What a drafter folder says of itself, without its weights being read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qm_spec import provenance
from qm_spec.discovery.checks import check_folder
from qm_spec.discovery.files import read_json
from qm_spec.discovery.weights import open_weights
from qm_spec.simulation.shapes import DrafterShape

# Tokens of context that the memory's cost is told at.
CONTEXTS = (1024, 8192, 32768)
# Elements of keys and values, in 16 bits.
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class DrafterSummary:
    """A drafter in short.

    Attributes:
        config: its config.json.
        num_parameters: of its weights, without the table of the draft vocabulary.
        num_bytes: of its file.
        dtypes: of its weights, in safetensors' names.
        stages: of its training, the oldest first; empty where it has no record.
    """

    config: dict[str, Any]
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    stages: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, folder: str | Path) -> DrafterSummary:
        """Read a drafter's config, its record and the header of its weights.

        Raises:
            FileNotFoundError: the drafter or one of its files is missing.
            TypeError, ValueError: it is no sound QuickMerge drafter, see `check_folder`.
        """
        folder = Path(folder).expanduser()
        config = check_folder(folder)
        file, record = folder / "model.safetensors", folder / provenance.FILE
        with open_weights(file) as weights:
            slices = [weights.get_slice(name) for name in weights.keys() if name != "d2t"]  # noqa: SIM118 - no dict
            num_parameters = sum(math.prod(one.get_shape()) for one in slices)
            dtypes = sorted({one.get_dtype() for one in slices})
        stages = read_json(record).get("stages") if record.is_file() else []
        if not (isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)):
            raise ValueError(f"drafter: {record} must hold a list of stages; copy it again or remove it")
        return cls(config, num_parameters, file.stat().st_size, tuple(dtypes), tuple(stages))

    @property
    def target_fingerprint(self) -> str | None:
        """Fingerprint of the one target that it belongs to."""
        return self.config.get("target_fingerprint")

    @property
    def is_untrained(self) -> bool:
        """Its record says that it learned nothing, as that of `qm-spec init` does."""
        return bool(self.stages) and all(stage.get("steps") == 0 for stage in self.stages)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield a name and a text for each thing that there is to say."""
        config, shape = self.config, DrafterShape.from_config(self.config)
        merge = shape.merge
        assert merge is not None
        untrained = "; UNTRAINED: random weights, few of its drafts are accepted" if self.is_untrained else ""
        yield "kind", f"QuickMerge prior, one layer over a merged KV cache{untrained}"
        yield "target", f"fingerprint {self.target_fingerprint}"
        yield (
            "sizes",
            f"hidden {shape.hidden_size}, MLP {shape.intermediate_size}, {shape.num_heads} query and "
            f"{shape.num_kv_heads} key/value heads of {shape.head_dim}",
        )
        yield (
            "weights",
            f"{self.num_parameters:,} parameters, {self.num_bytes:,} bytes in {', '.join(self.dtypes)}; embedding and "
            "head are the target's",
        )
        yield "aux layers", ", ".join(map(str, config["eagle_aux_hidden_state_layer_ids"]))
        yield "K", f"{config['num_speculative_tokens']} draft tokens a step"
        size, whole = shape.draft_vocab_size, config["vocab_size"]
        yield "draft vocabulary", f"{size:,} of {whole:,} tokens" if size < whole else f"all {whole:,} tokens"
        length = config.get("lookup_length", 0)
        yield "lookup", f"copies from a match of {length} tokens" if length else "none"
        yield (
            "merging",
            f"window {merge.window}; then groups of {merge.group_size} as {', '.join(map(str, merge.schedule))} "
            f"entries, by {merge.saliency}",
        )
        entry = shape.kv_bytes(_ELEMENT_BYTES)
        yield "KV cache", f"{entry:,} bytes for each token of context in 16 bits; merging frees none"
        for context in CONTEXTS:
            read = shape.attended(context)
            yield f"at {context:,}", f"a draft token reads {read:,} entries, {read * entry:,} bytes"
        if not self.stages:
            yield "provenance", "no record"
        for number, stage in enumerate(self.stages, 1):
            yield f"stage {number} of {len(self.stages)}", _stage_line(stage)


def _stage_line(stage: dict[str, Any]) -> str:
    """Say what is recorded of a stage; of one that learned nothing from data, what was done."""
    texts = {
        "steps": "{} steps",
        "rows": "{:,} rows learned",
        "valid_acceptance_length": "acceptance length {:.2f} on validation documents",
        "commit": "commit {}",
    }
    said = [text.format(stage[name]) for name, text in texts.items() if stage.get(name) is not None]
    return ", ".join(said) or str(stage.get("command"))
