"""Writes Meta's layout, as the files of tensor parallelism that Llama 2 was released in."""

import json

import torch

ROW_SPLIT = ("wq", "wk", "wv", "w1", "w3", "output")  # dimension 0: rows of the weight
COLUMN_SPLIT = ("wo", "w2", "tok_embeddings")  # dimension 1


def interleave(weight, head_dim):
    """Rows of q or k from half-split to Meta's order, in which a rotary pair is two neighbours."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_tensors(tensors, config):
    """Meta's names and row order for tensors by HF's names."""
    named = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]),
    }
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        named |= {
            ours + "attention.wq.weight": interleave(tensors[theirs + "self_attn.q_proj.weight"], config.head_dim),
            ours + "attention.wk.weight": interleave(tensors[theirs + "self_attn.k_proj.weight"], config.head_dim),
            ours + "attention.wv.weight": tensors[theirs + "self_attn.v_proj.weight"],
            ours + "attention.wo.weight": tensors[theirs + "self_attn.o_proj.weight"],
            ours + "feed_forward.w1.weight": tensors[theirs + "mlp.gate_proj.weight"],
            ours + "feed_forward.w2.weight": tensors[theirs + "mlp.down_proj.weight"],
            ours + "feed_forward.w3.weight": tensors[theirs + "mlp.up_proj.weight"],
            ours + "attention_norm.weight": tensors[theirs + "input_layernorm.weight"],
            ours + "ffn_norm.weight": tensors[theirs + "post_attention_layernorm.weight"],
        }
    return named


def meta_params(config, **changes):
    """params.json as Meta writes it: no width of the MLP, no vocabulary, no context length; None leaves a key out."""
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "multiple_of": config.ffn_dim,
        "ffn_dim_multiplier": config.ffn_dim / (2 * int(8 * config.dim / 3)),
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
        "rope_theta": config.rope_theta,
        **changes,
    }
    return {name: value for name, value in params.items() if value is not None}


def shard(named, count, number, embed_axis=1, kv_heads=None):
    """What file `number` of `count` holds. `kv_heads`: files hold one of so many whole key/value heads, in copies."""
    held = {"rope.freqs": torch.ones(8)}
    for name, tensor in named.items():
        part = name.split(".")[-2]
        if part in ("wk", "wv") and kv_heads:
            tensor = tensor.chunk(kv_heads)[number * kv_heads // count]
        elif part in ROW_SPLIT or (part == "tok_embeddings" and embed_axis == 0):
            tensor = tensor.chunk(count)[number]
        elif part in COLUMN_SPLIT:
            tensor = tensor.chunk(count, dim=1)[number]
        held[name] = tensor.clone()
    return held


def save_meta(tensors, config, directory, count=1, embed_axis=1, kv_heads=None, **changes):
    """`count` files of the tensors, which go by HF's names, and params.json with `changes`."""
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(meta_params(config, **changes)))
    named = meta_tensors(tensors, config)
    for number in range(count):
        torch.save(shard(named, count, number, embed_axis, kv_heads), directory / f"consolidated.{number:02d}.pth")
