"""Adding nodes to a joint graph: what its rewrites share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

_KEPT = ("stack_trace", "nn_module_stack", "partitioner_tag", "seq_nr", "autograd_backward")


class Writer:
    """Adds nodes at one place of a graph, with the fake values that a partitioner reads."""

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node) -> None:
        self.graph, self.before = graph, before
        self.meta = {k: like.meta[k] for k in _KEPT if k in like.meta}
        values = torch.utils._pytree.tree_leaves(like.meta["val"])
        self.mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            value = target(*fakes[0], **fakes[1])
        node.meta = {**self.meta, "val": value}
        return node


def value_of(node: Any) -> Tensor | None:
    """The fake tensor that a node makes; None if it makes something else."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None
