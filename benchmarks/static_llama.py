"""Llama as one would write it for torch.compile: merged projections, caches of a fixed size.

The strongest form for Inductor that we know of: no Python objects between steps, one mask row read
by position, weights merged by hand. It takes its weights from a model of `transformers`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.Module):
    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    """One block; `keys` and `values` are its caches [B, G, capacity, D]."""

    keys: Tensor
    values: Tensor

    def __init__(self, block: Any, config: Any, batch: int, capacity: int) -> None:
        super().__init__()
        own, mlp = block.self_attn, block.mlp
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = own.head_dim
        parts = [own.q_proj.weight, own.k_proj.weight, own.v_proj.weight]
        self.qkv = torch.cat([p.detach() for p in parts])
        self.out, self.down = own.o_proj.weight.detach(), mlp.down_proj.weight.detach()
        self.up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
        self.before = RmsNorm(block.input_layernorm.weight.detach(), config.rms_norm_eps)
        self.after = RmsNorm(block.post_attention_layernorm.weight.detach(), config.rms_norm_eps)
        shape = (batch, self.groups, capacity, self.size)
        self.register_buffer("keys", self.qkv.new_zeros(shape))
        self.register_buffer("values", self.qkv.new_zeros(shape))

    def forward(self, x: Tensor, place: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        sizes = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = F.linear(self.before(x), self.qkv).split(sizes, -1)
        q, k, v = (t.view(batch, tokens, -1, self.size).transpose(1, 2) for t in (q, k, v))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        self.keys[:, :, place] = k
        self.values[:, :, place] = v
        if tokens > 1:
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            made = F.scaled_dot_product_attention(
                q, self.keys, self.values, attn_mask=mask, enable_gqa=True
            )
        x = x + F.linear(made.transpose(1, 2).reshape(batch, tokens, -1), self.out)
        gate, up = F.linear(self.after(x), self.up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class StaticLlama(nn.Module):
    """ids [B, n] at positions [n] -> logits [B, 1, V] of the last; n > 1 only from position 0."""

    cos: Tensor
    sin: Tensor
    causal: Tensor

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__()
        config = model.config
        inner = model.model
        self.table, self.head = inner.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.layers = nn.ModuleList(Layer(b, config, batch, capacity) for b in inner.layers)
        self.norm = RmsNorm(inner.norm.weight.detach(), config.rms_norm_eps)
        places = torch.arange(capacity, device=self.table.device)
        cos, sin = inner.rotary_emb(self.table, places[None])
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])
        self.register_buffer("causal", places[:, None] >= places[None])

    def forward(self, ids: Tensor, place: Tensor) -> Tensor:
        x = F.embedding(ids, self.table)
        mask, cos, sin = self.causal[place][None, None], self.cos[place], self.sin[place]
        for layer in self.layers:
            x = layer(x, place, cos, sin, mask)
        return F.linear(self.norm(x[:, -1:]), self.head)
