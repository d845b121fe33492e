"""Three layers that copy, wired by hand into a trained Llama.

Small transformers learn to copy from their context late, after more text than a laptop reads in a
day. So the circuit they would find (an induction head: "what followed the last time?") is put in
place, and training only has to fit the rest of the model to it.

The residual stream gets 128 more channels, which the old layers neither read nor write:

- a random code of the token (64), the same for the input and, the ends being tied, for the output;
- a constant (1);
- a history of the last tokens' codes (36), `history_t = sum_i R^i P code(x_{t-i})`, R a rotation;
- nothing (27), free to be learned.

Two of the new layers come first of all: their heads attend to the tokens 0, 1, 2... places back, 2 H of them with H
heads, and write their parts of the history. (Fewer tokens repeat by chance in any text.) The third one's heads
compare `R history_t` with `history_j - P code(x_j)`: the more of the last tokens agree with those before j, the
higher the score. They write the code of the token at j, which the tied output layer reads. Histories are compared
in the slowest rotary channels, whatever the distance. What is long is found by mistake, so all codes are equally
long where they are read: the size of the stream before the first layers depends on the token alone, and the codes
make up for it.

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
# The new channels of the embedding are about as large as the old ones of the shipped target: the constant, and the
# typical length of a code.
CODE_SCALE = 0.08
CODE_LENGTH = CODE_SCALE * CODE**0.5
# Rotary channels fast enough to tell neighbouring positions apart.
FAST = 6
# Score of "exactly h places back" over its neighbours, about 9 nats.
SHARPNESS = 10.0
# Length of a token's part of the history: beside the embedding, drafters shall be able to read it.
HISTORY_LENGTH = 0.16
# Score of one equal token of the history. Where nothing follows from the past, the scores are so near that what is
# copied is a mixture, and small.
MATCH = 2.4
# Equal tokens at which the score is 0, of 9 with five heads. At 0 a long key gains on a right one, at 9 a short one.
OFFSET = 5.5
# Norm of the copied code against that of the stream it is added to, and its weight in the logits.
COPY_SHARE, COPY_GAIN = 0.5, 4.5


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
    """Return a wider copy of `model` with three copying layers.

    Args:
        model: a trained Llama with tied ends, one key/value head and a head size of 64; or one that was planted and
            trained before, which gets new copying layers in the place of its own.
        input_ids: `[B, N]`, some text: the size of its residual stream at `depth` sets the scales.
        keep_layers: the old layers that are taken over, in order.
        depth: number of kept layers before the one that copies; at least 1.
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
    copying_before = getattr(old, "copying_layers", [])
    if set(keep_layers) & set(copying_before):
        raise ValueError(f"plant_induction: layers {copying_before} copy already; leave them out of {keep_layers}")
    wide = _kept(model, keep_layers) if copying_before else _widened(model, keep_layers, rope_theta, context)
    states = wide(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    level = states[depth].square().mean(-1).sqrt().median().item()

    config = LlamaConfig(**{**wide.config.to_dict(), "num_hidden_layers": len(keep_layers) + 3})
    config.copying_layers = [0, 1, depth + 2]
    planted = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    own, constant, history = _channels(config.hidden_size)
    table = wide.get_input_embeddings().weight
    table[:, own.start : history.stop] = 0
    project = torch.linalg.qr(torch.randn(CODE, HISTORY, generator=generator))[0].T
    # Lengths for which RMSNorm, which sees the code beside the rest, makes all codes equally long.
    table[:, constant] = CODE_SCALE
    rest = table.square().sum(-1, keepdim=True)
    share = 1 / (1 + rest.median().item() / CODE_LENGTH**2)
    table[:, own] = _codes(project, len(table), generator) * (share / (1 - share) * rest).sqrt()
    planted.get_input_embeddings().weight.copy_(table)
    places = [place for place in range(config.num_hidden_layers) if place not in config.copying_layers]
    for layer, place in zip(wide.model.layers, places, strict=True):
        planted.model.layers[place].load_state_dict(layer.state_dict())
    planted.model.norm.weight.copy_(wide.model.norm.weight)
    planted.model.norm.weight[own] = COPY_GAIN
    planted.model.norm.weight[constant:] = 0
    rotation = torch.linalg.qr(torch.randn(HISTORY, HISTORY, generator=generator))[0]
    *remembering, copying = (planted.model.layers[place] for place in config.copying_layers)
    for number, layer in enumerate(remembering):
        _wire_memory(layer, number, project, rotation, share, config.rope_parameters["rope_theta"])
    _wire_copying(copying, project, rotation, level)
    return planted


def protect_induction(model: PreTrainedModel) -> None:
    """Train only what stands behind the copying layers of `model`, so that these find what they were wired for.

    They are wired for one size of the stream, which all layers before them write to: where it doubled, the scores fell
    to a quarter, and so did what was copied. A model without copying layers is left alone.
    """
    copying = getattr(model.config, "copying_layers", ())
    if copying:
        model.get_input_embeddings().requires_grad_(False)
        model.model.layers[: copying[-1] + 1].requires_grad_(False)


def _kept(model: LlamaForCausalLM, keep_layers: Sequence[int]) -> LlamaForCausalLM:
    """Return a copy of `model` with some of its layers."""
    kept = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": len(keep_layers)})).eval()
    kept.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    kept.model.norm.weight.copy_(model.model.norm.weight)
    for index, layer in zip(keep_layers, kept.model.layers, strict=True):
        layer.load_state_dict(model.model.layers[index].state_dict())
    return kept


def _widened(
    model: LlamaForCausalLM, keep_layers: Sequence[int], rope_theta: float, context: int
) -> LlamaForCausalLM:
    """Return a copy of `model` with some of its layers, and channels and heads that they leave alone."""
    old = model.config
    wide = LlamaForCausalLM(
        LlamaConfig(
            **{
                **old.to_dict(),
                "hidden_size": old.hidden_size + EXTRA,
                "num_attention_heads": old.num_attention_heads + EXTRA // HEAD_DIM,
                "num_hidden_layers": len(keep_layers),
                "max_position_embeddings": context,
                "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
            }
        )
    ).eval()
    # RMSNorm now divides by the mean over more channels.
    shrink = (old.hidden_size / wide.config.hidden_size) ** 0.5
    wide.get_input_embeddings().weight.zero_()[:, : old.hidden_size] = model.get_input_embeddings().weight
    wide.model.norm.weight.copy_(_widen_norm(model.model.norm.weight, shrink))
    for index, layer in zip(keep_layers, wide.model.layers, strict=True):
        _widen(model.model.layers[index], layer, shrink)
    return wide


def _codes(project: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return random codes `[count, CODE]` of length 1, all with the same share in the space of `project`.

    A token whose code is long in the history would be found in place of the right one.
    """
    codes = torch.randn(count, CODE, generator=generator)
    inside = codes @ project.T @ project
    share = (HISTORY / CODE) ** 0.5
    normalize = torch.nn.functional.normalize
    return share * normalize(inside, dim=-1) + (1 - share**2) ** 0.5 * normalize(codes - inside, dim=-1)


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


def _channels(width: int) -> tuple[slice, int, slice]:
    """Return where the token's code, the constant and the history stand in a stream of `width` channels."""
    constant = width - EXTRA + CODE
    return slice(width - EXTRA, constant), constant, slice(constant + 1, constant + 1 + HISTORY)


def _wire_memory(
    layer: LlamaDecoderLayer, number: int, project: Tensor, rotation: Tensor, share: float, rope_theta: float
) -> None:
    """Let head h of memory layer `number` write the token `number H + h` places back into the history.

    The score is `cos(theta (distance - wanted))` in the fast channels; the slowest one takes the maximum off again, so
    that it is 0 at the wanted place and below elsewhere, however large the key is. `share` is the code's part of the
    square of its norm's input.
    """
    out = layer.self_attn.o_proj.weight
    width, half = len(out), HEAD_DIM // 2
    heads = out.shape[1] // HEAD_DIM
    own, constant, history = _channels(width)
    layer.input_layernorm.weight.fill_(1)
    # In units in which a code has the length 1, and the constant is about 1.
    layer.input_layernorm.weight[own] = (share * width) ** -0.5
    layer.input_layernorm.weight[constant] = CODE_LENGTH / CODE_SCALE * (share * width) ** -0.5
    layer.mlp.down_proj.weight.zero_()
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight.zero_()
    theta = rope_theta ** (-torch.arange(FAST) / half)
    angle = (number * heads + torch.arange(heads))[:, None] * theta
    query = torch.zeros(heads, HEAD_DIM, width)
    query[:, :FAST, constant] = SHARPNESS * torch.cos(angle)
    query[:, half : half + FAST, constant] = -SHARPNESS * torch.sin(angle)
    query[:, half - 1, constant] = -SHARPNESS * FAST
    layer.self_attn.q_proj.weight.copy_(query.flatten(0, 1))
    layer.self_attn.k_proj.weight[:FAST, constant] = SHARPNESS
    layer.self_attn.k_proj.weight[half - 1, constant] = SHARPNESS
    layer.self_attn.v_proj.weight[:, own] = torch.eye(CODE)
    written = torch.zeros(width, heads, HEAD_DIM)
    turned = torch.linalg.matrix_power(rotation, number * heads) @ project
    for head in range(heads):
        written[history, head] = HISTORY_LENGTH * turned
        turned = rotation @ turned
    out.copy_(written.flatten(1))


def _wire_copying(layer: LlamaDecoderLayer, project: Tensor, rotation: Tensor, level: float) -> None:
    """Let all heads of `layer` copy the token behind the place whose history is the most like ours.

    `level` is the size of its input, beside which the new channels are tiny; the norm's weights undo that.
    """
    out = layer.self_attn.o_proj.weight
    width, half = len(out), HEAD_DIM // 2
    heads = out.shape[1] // HEAD_DIM
    own, constant, history = _channels(width)
    # The part of a code that `project` keeps.
    kept = (HISTORY / CODE) ** 0.5
    layer.input_layernorm.weight.fill_(1)
    layer.input_layernorm.weight[own] = level / CODE_LENGTH
    layer.input_layernorm.weight[constant] = level / CODE_SCALE
    layer.input_layernorm.weight[history] = level / (HISTORY_LENGTH * kept)
    layer.mlp.down_proj.weight.zero_()
    slow = torch.arange(half - 1 - HISTORY // 2, half - 1)
    slow = torch.cat([slow, slow + half])
    key, value = layer.self_attn.k_proj.weight.zero_(), layer.self_attn.v_proj.weight.zero_()
    key[half - 1, constant] = 1
    key[slow, history] = torch.eye(HISTORY)
    key[slow, own] = -project / kept
    value[:, own] = torch.eye(CODE)
    query, written = torch.zeros(heads, HEAD_DIM, width), torch.zeros(width, heads, HEAD_DIM)
    query[:, slow, history] = MATCH * HEAD_DIM**0.5 * rotation
    query[:, half - 1, constant] = -MATCH * HEAD_DIM**0.5 * OFFSET
    written[own] = torch.eye(CODE)[:, None] * COPY_SHARE * level * width**0.5 / heads
    layer.self_attn.q_proj.weight.copy_(query.flatten(0, 1))
    out.copy_(written.flatten(1))
