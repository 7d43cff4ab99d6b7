"""Healing: a short training that brings a changed program back to what it was.

    heal(student, teacher, batches)     # modules before and after convert_gqa, sparsify, ...

All floating weights of the student are trained (AdamW) so that its predictions become the
teacher's: the Kullback-Leibler divergence of the distributions over the last axis (Hinton et al.,
2015, "Distilling the Knowledge in a Neural Network"). Both are run by the interpreter, so that any
program can be healed; it is meant for models of a size that a CPU trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.errors import OptionError
from accel.ir.interpret import interpret
from accel.ir.module import Module
from accel.ir.storage import WeightStore


def heal(
    student: Module,
    teacher: Module,
    batches: Iterable[Sequence[Tensor]],
    *,
    learning_rate: float = 3e-4,
) -> list[float]:
    """Trains the student's weights in place, one step a batch; returns the loss of each step.

    Args:
        student: its @main is trained.
        teacher: a module whose @main takes the same inputs and has one result.
        batches: inputs of @main.

    Raises OptionError if there is nothing to train.
    """
    trained = {
        name: nn.Parameter(student.weights.tensor(name).detach().clone())
        for name in student.weights.names()
        if student.weights.type(name).dtype in (torch.float32, torch.float64)
    }
    if not trained:
        raise OptionError("healing trains float32 and float64 weights, and there are none")
    store = _with(student.weights, trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for inputs in batches:
        wanted = interpret(teacher.main, inputs, teacher.weights)[0]
        got = interpret(student.main, inputs, store, grad=True)[0]
        loss = F.kl_div(
            torch.log_softmax(got, -1).flatten(0, -2),
            torch.log_softmax(wanted, -1).flatten(0, -2),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    student.weights = _with(student.weights, {n: p.detach() for n, p in trained.items()})
    return losses


def _with(
    weights: WeightStore, changed: dict[str, Tensor] | dict[str, nn.Parameter]
) -> WeightStore:
    """A store with other tensors under some names."""
    store = weights.copy()
    for name, tensor in changed.items():
        store.remove(name)
        store.add(name, tensor)
    return store
