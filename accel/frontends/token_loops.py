"""Recurrences that models compute in chunks, token by token while a model is captured.

Mamba-2's state space duality and the (gated) delta rule are loops over the tokens that carry a
state. Packages write them in chunks, which are fast for a prompt and of a fixed size, so that no
program of any length follows from them, and no state. `token_by_token` puts the loop in their
place: the function of that name in the modules of a model, if it gives the same result on random
data (else it stays what it is). `accel.passes.reroll` makes `accel.scan` of the loops.

Papers: Dao and Gu, 2024 (Mamba-2); Yang et al., 2024 (gated delta networks); Kimi Linear, 2025.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK, _TOKENS, _HEADS, _WIDTH = 4, 11, 4, 6
_CAPTURE = threading.RLock()  # modules are changed for as long as one model is captured


def state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Any:
    """hidden_states [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N] -> [B, S, H, P].

    The state [B, H, P, N] is float32; so is the result, as the chunked form's is.
    """
    batch, length, heads, width = hidden_states.shape
    steps = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    steps = F.softplus(steps) if dt_softplus else steps
    steps = steps.clamp(*dt_limit)[..., None]
    x = hidden_states.float()
    repeats = heads // B.shape[2]
    b, c = (t.float().repeat_interleave(repeats, dim=2)[..., None, :] for t in (B, C))
    decay = torch.exp(steps.float() * A.float()[:, None])[..., None]
    new = (x * steps.float())[..., None]
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    if initial_states is not None:
        state = initial_states.float()
    made = []
    for t in range(length):
        state = state * decay[:, t] + new[:, t] * b[:, t]
        made.append((state * c[:, t]).sum(-1))
    y = torch.stack(made, 1)
    if D is not None:
        y = y + D[..., None] * x
    return (y, state) if return_final_states else y


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key [B, S, G, K], value [B, S, H, V], beta [B, S, H], g [B, S, H] or [B, S, H, K]
    (the decay's logarithm) -> [B, S, H, V] and the state [B, H, K, V], float32, if asked for."""
    heads = value.shape[2]
    q, k, v, decay, rate = (t.float() for t in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    if key.shape[2] != heads:
        q, k = (t.repeat_interleave(heads // key.shape[2], dim=2) for t in (q, k))
    q = q[..., None] / key.shape[-1] ** 0.5
    k, v = k[..., None], v[..., None, :]
    decay = decay.exp()[..., None] if decay.dim() == 4 else decay.exp()[..., None, None]
    rate = rate[..., None, None]
    state = v.new_zeros(key.shape[0], heads, key.shape[-1], value.shape[-1])
    if initial_state is not None:
        state = initial_state.float()
    made = []
    for t in range(key.shape[1]):
        state = state * decay[:, t]
        known = (state * k[:, t]).sum(-2, keepdim=True)
        state = state + k[:, t] * ((v[:, t] - known) * rate[:, t])
        made.append((state * q[:, t]).sum(-2))
    y = torch.stack(made, 1).to(query.dtype)
    return y, state if output_final_state else None


def _draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def _tried_state_space(function: Callable[..., Any]) -> Tensor:
    x, dt = _draw(2, _TOKENS, _HEADS, _WIDTH), _draw(2, _TOKENS, _HEADS)
    given = (x, dt, -_draw(_HEADS).exp(), _draw(2, _TOKENS, 2, 3), _draw(2, _TOKENS, 2, 3), _CHUNK)
    made: Tensor = function(*given, D=_draw(_HEADS), dt_bias=_draw(_HEADS), dt_softplus=True)
    return made


def _tried_delta_rule(function: Callable[..., Any], wide: bool = False) -> Tensor:
    q, k, v = (_draw(2, _TOKENS, _HEADS, n) for n in (_WIDTH, _WIDTH, _WIDTH + 1))
    g = _draw(2, _TOKENS, _HEADS, _WIDTH) if wide else _draw(2, _TOKENS, _HEADS)
    given = {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True}
    beta = _draw(2, _TOKENS, _HEADS).sigmoid()
    made: Tensor = function(q, k, v, g=-g.abs(), beta=beta, chunk_size=_CHUNK, **given)[0]
    return made


def _tried_wide_delta_rule(function: Callable[..., Any]) -> Tensor:
    return _tried_delta_rule(function, wide=True)


# Name of a chunked form -> the loop, and what both are tried on.
_LOOPS: dict[str, tuple[Callable[..., Any], Callable[[Callable[..., Any]], Tensor]]] = {
    "mamba2_chunk_scan": (state_space, _tried_state_space),
    "torch_chunk_gated_delta_rule": (delta_rule, _tried_delta_rule),
    "chunk_kimi_delta_attention": (delta_rule, _tried_wide_delta_rule),
}


@contextmanager
def token_by_token(model: nn.Module) -> Iterator[None]:
    """Chunked recurrences in the modules of `model` are loops over the tokens meanwhile."""
    names = dict.fromkeys(type(m).__module__ for m in model.modules())
    changed: list[tuple[Any, str, Any]] = []
    with _CAPTURE:
        try:
            for module in (sys.modules[n] for n in names if n in sys.modules):
                for name, (loop, tried) in _LOOPS.items():
                    known = getattr(module, name, None)
                    if known is not None and known is not loop and _agree(known, loop, tried):
                        changed.append((module, name, known))
                        setattr(module, name, loop)
            yield
        finally:
            for module, name, known in changed:
                setattr(module, name, known)


def _agree(
    known: Callable[..., Any], loop: Callable[..., Any], tried: Callable[..., Tensor]
) -> bool:
    """Whether both give the same result; a function of other arguments is another function."""
    with torch.no_grad():
        try:
            wanted = tried(known)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        made = tried(loop)
    return wanted.shape == made.shape and torch.allclose(wanted, made, rtol=1e-3, atol=1e-4)
