"""Two layers that copy, wired by hand into a trained Llama.

Small transformers learn to copy from their context late, after more text than a laptop reads in a
day. So the circuit they would find (an induction head: "what followed the last time?") is put in
place, and training only has to fit the rest of the model to it.

The residual stream gets 128 more channels, which the old layers neither read nor write:

- a random code of the token (64), the same for the input and, the ends being tied, for the output;
- a constant (1);
- a history of the last tokens' codes (36), `history_t = sum_i R^i P code(x_{t-i})`, R a rotation;
- nothing (27), free to be learned.

The first new layer's head h attends to the token h places back and writes its part of the history.
The second one's heads compare `R history_t` with `history_j - P code(x_j)`: the more of the last
tokens agree with those before j, the higher the score. They write the code of the token at j, which the
tied output layer reads. Histories are compared in the slowest rotary channels, whatever the distance.

Source: Olsson et al. 2022, "In-context learning and induction heads"; the wiring is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qm_spec import provenance
from qm_spec.training.data import find_files, read_documents, sha256_of, tokenize

HEAD_DIM = 64
CODE, HISTORY = 64, 36
EXTRA = 128
# The new channels of the embedding are about as large as the old ones of the shipped target.
CODE_SCALE = 0.08
# Rotary channels fast enough to tell neighbouring positions apart.
FAST = 6
# Score of "exactly h places back" over its neighbours, about 9 nats.
SHARPNESS = 10.0
# A token's part of the history against the stream: later layers, and drafters, shall be able to read it.
HISTORY_SHARE = 0.25
# Score of one equal token of the history.
MATCH = 5.0
OFFSET = 4
# Norm of the copied code against that of the stream it is added to, and its weight in the logits.
COPY_SHARE, COPY_GAIN = 0.5, 1.5


def plant_target(
    target_dir: Path, data: Sequence[Path], out: Path, *, keep_layers: Sequence[int], depth: int, seed: int = 0
) -> dict:
    """Plant copying layers into the target in `target_dir`, save it under `out`, return this stage's provenance.

    Args:
        target_dir: folder of a Llama, see `plant_induction`.
        data: text files or folders; the first 1024 tokens are read.
        out: folder of the new target.
        keep_layers, depth, seed: see `plant_induction`.

    Raises:
        FileNotFoundError: target or data missing.
        ValueError: a model of another shape.
    """
    if not (target_dir / "config.json").is_file():
        raise FileNotFoundError(f"plant-induction: {target_dir} holds no config.json; pass the folder of a Llama")
    commit, files = provenance.git_commit(), find_files(data)[:1]
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    model = LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    # The start of a text has as many tokens as are asked for in at most so many characters.
    start = next(read_documents(files))[:20000]
    input_ids = torch.from_numpy(tokenize(tokenizer, [start])[:1024]).long().view(2, -1)
    planted = plant_induction(model, input_ids, keep_layers=keep_layers, depth=depth, seed=seed)
    planted.save_pretrained(out)
    tokenizer.save_pretrained(out)
    stage = {
        "command": provenance.command(),
        "commit": commit,
        "data_sha256": sha256_of(files),
        "seed": seed,
        "layers_kept": list(keep_layers),
        "depth": depth,
        "versions": provenance.versions(),
    }
    provenance.write_stage(out, stage, target_dir)
    return stage


@torch.no_grad()
def plant_induction(
    model: LlamaForCausalLM,
    input_ids: Tensor,
    *,
    keep_layers: Sequence[int],
    depth: int,
    rope_theta: float = 1e10,
    context: int = 16384,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Return a wider copy of `model` with two copying layers.

    Args:
        model: a trained Llama with tied ends, one key/value head and a head size of 64.
        input_ids: `[B, N]`, some text: the size of its residual stream at `depth` sets the scales.
        keep_layers: the old layers that are taken over, in order.
        depth: number of kept layers before the new ones; at least 1.
        rope_theta: of the new model; slow enough that the slowest 38 channels hardly turn.
        context: tokens, the new model's declared limit.
        seed: of the random codes.

    Raises:
        ValueError: a model of another shape.
    """
    old = model.config
    if old.num_key_value_heads != 1 or old.head_dim != HEAD_DIM or not old.tie_word_embeddings:
        raise ValueError(
            "plant_induction: expected tied ends, one key/value head and a head size of 64, "
            f"got {old.num_key_value_heads} heads of {old.head_dim}, tied: {old.tie_word_embeddings}"
        )
    if not 1 <= depth <= len(keep_layers):
        raise ValueError(f"plant_induction: depth must be in 1..{len(keep_layers)}, got {depth}")
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    level = states[keep_layers[depth - 1] + 1].square().mean(-1).sqrt().median().item()
    config = LlamaConfig(
        **{
            **old.to_dict(),
            "hidden_size": old.hidden_size + EXTRA,
            "num_attention_heads": old.num_attention_heads + EXTRA // HEAD_DIM,
            "num_hidden_layers": len(keep_layers) + 2,
            "max_position_embeddings": context,
            "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        }
    )
    config.copying_layers = [depth, depth + 1]
    config.copying_channels = [old.hidden_size, old.hidden_size + CODE + 1 + HISTORY]
    planted = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    # RMSNorm now divides by the mean over more channels.
    shrink = (old.hidden_size / config.hidden_size) ** 0.5

    table = model.get_input_embeddings().weight
    codes = torch.nn.functional.normalize(torch.randn(len(table), CODE, generator=generator), dim=-1)
    extra = torch.cat([codes * CODE_SCALE * CODE**0.5, codes.new_full((len(table), 1), CODE_SCALE)], -1)
    spare = table.new_zeros(len(table), EXTRA - CODE - 1)
    planted.get_input_embeddings().weight.copy_(torch.cat([table, extra, spare], -1))

    new_layers = iter(planted.model.layers)
    for number, index in enumerate(keep_layers):
        if number == depth:
            remember, copy = next(new_layers), next(new_layers)
        _widen(model.model.layers[index], next(new_layers), shrink)
    if depth == len(keep_layers):
        remember, copy = next(new_layers), next(new_layers)
    planted.model.norm.weight.copy_(_widen_norm(model.model.norm.weight, shrink))
    planted.model.norm.weight[old.hidden_size : old.hidden_size + CODE] = COPY_GAIN
    planted.model.norm.weight[old.hidden_size + CODE :] = 0
    _wire(remember, copy, config, level * shrink, rope_theta, generator)
    return planted


def protect_induction(model: PreTrainedModel) -> None:
    """Keep the copying layers and their channels as they were wired while the rest of `model` is trained.

    The old layers write a thousand times more into the stream than the codes hold, so one step of theirs into
    these channels would drown them. They may read them. A model without copying layers is left alone.
    """
    for layer in getattr(model.config, "copying_layers", ()):
        model.model.layers[layer].self_attn.requires_grad_(False)
        model.model.layers[layer].input_layernorm.requires_grad_(False)
    reserved = slice(*getattr(model.config, "copying_channels", (0, 0)))

    def spare_rows(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.arange(*reserved.indices(len(gradient)), device=gradient.device), 0)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.register_hook(spare_rows)
    table = model.get_input_embeddings().weight
    table.register_hook(lambda gradient: spare_rows(gradient.T).T)


def _widen_norm(weight: Tensor, shrink: float) -> Tensor:
    return torch.cat([weight * shrink, weight.new_ones(EXTRA)])


def _widen(old: LlamaDecoderLayer, new: LlamaDecoderLayer, shrink: float) -> None:
    """Copy a layer's weights into a wider one; the new channels and heads are left out of it."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(new, name).weight.copy_(_widen_norm(getattr(old, name).weight, shrink))
    width = old.self_attn.q_proj.weight.shape[1]
    for part in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        wide = new.get_submodule(part).weight
        wide.zero_()[:, :width] = old.get_submodule(part).weight
    # The new heads' queries keep their random start: nothing reads them yet, and they may learn.
    new.self_attn.q_proj.weight[:width].zero_()[:, :width] = old.self_attn.q_proj.weight
    new.self_attn.o_proj.weight.zero_()[:width, :width] = old.self_attn.o_proj.weight
    new.mlp.down_proj.weight.zero_()[:width] = old.mlp.down_proj.weight


def _wire(
    remember: LlamaDecoderLayer,
    copy: LlamaDecoderLayer,
    config: LlamaConfig,
    level: float,
    rope_theta: float,
    generator: torch.Generator,
) -> None:
    """Set the weights of the two new layers; `level` is the size of their input."""
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    half, start = size // 2, config.hidden_size - EXTRA
    own, constant, history = (
        slice(start, start + CODE),
        start + CODE,
        slice(start + CODE + 1, start + CODE + 1 + HISTORY),
    )
    rotation = torch.linalg.qr(torch.randn(HISTORY, HISTORY, generator=generator))[0]
    project = torch.linalg.qr(torch.randn(CODE, HISTORY, generator=generator))[0].T
    code_norm = CODE_SCALE * CODE**0.5
    history_norm = HISTORY_SHARE * level * CODE**0.5
    spread = (CODE / HISTORY) ** 0.5
    for layer in (remember, copy):
        # The new channels are tiny beside the stream; the norm's weights bring them to length 1.
        layer.input_layernorm.weight.fill_(1)
        layer.input_layernorm.weight[own] = level / code_norm
        layer.input_layernorm.weight[constant] = level / CODE_SCALE
        layer.input_layernorm.weight[history] = level / history_norm * spread
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.k_proj.weight.zero_()
        layer.self_attn.v_proj.weight.zero_()[:, own] = torch.eye(CODE)

    # cos(theta (distance - h)) in the fast channels; the slowest one takes the maximum off again, so
    # that the score is 0 at the wanted place and below it elsewhere, however large the key is.
    theta = rope_theta ** (-torch.arange(FAST) / half)
    remember.self_attn.k_proj.weight[:FAST, constant] = SHARPNESS
    remember.self_attn.k_proj.weight[half - 1, constant] = SHARPNESS
    query, out = torch.zeros(heads, size, width), torch.zeros(width, heads, size)
    turned = project
    for head in range(heads):
        query[head, :FAST, constant] = SHARPNESS * torch.cos(head * theta)
        query[head, half : half + FAST, constant] = -SHARPNESS * torch.sin(head * theta)
        query[head, half - 1, constant] = -SHARPNESS * FAST
        out[history, head] = turned * history_norm
        turned = rotation @ turned
    remember.self_attn.q_proj.weight.copy_(query.flatten(0, 1))
    remember.self_attn.o_proj.weight.copy_(out.flatten(1))

    slow = torch.arange(half - 1 - HISTORY // 2, half - 1)
    slow = torch.cat([slow, slow + half])
    copy.self_attn.k_proj.weight[half - 1, constant] = 1
    copy.self_attn.k_proj.weight[slow, history] = torch.eye(HISTORY)
    copy.self_attn.k_proj.weight[slow, own] = -project * spread
    query, out = torch.zeros(heads, size, width), torch.zeros(width, heads, size)
    query[:, slow, history] = MATCH * size**0.5 * rotation
    # Here, too, the best score is 0: otherwise a small key gains on a large one.
    query[:, half - 1, constant] = -MATCH * size**0.5 * OFFSET
    out[own] = torch.eye(CODE)[:, None] * COPY_SHARE * level * width**0.5 / heads
    copy.self_attn.q_proj.weight.copy_(query.flatten(0, 1))
    copy.self_attn.o_proj.weight.copy_(out.flatten(1))
