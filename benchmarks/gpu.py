"""Whole models on one GPU beside eager PyTorch and Inductor: time of a call, compile time, error.

    python -m benchmarks.gpu [--names bert_b1,gpt2_train_b8] [--systems eager,accel] [--out FILE]
                             [--caches FOLDER] [--limit SECONDS] [--roofline]

All systems of a row run in this process, on the same inputs, one after another; CUDA graphs are
allowed to all. A figure is the median of many calls between two CUDA events; a call of a training
row is forward, backward and optimizer. Each system's outputs (or gradients) are compared with eager
float32 before it is timed. Rows that FILE has of other workloads stay, if they were measured on the
same kind of GPU with the same torch.

accel and the first of Inductor's modes compile without anything cached. The other modes find its
kernels, or come from caches that `benchmarks.prepare_peers` made: they are timed as all, and have
no seconds of compiling. A system that is not ready within `--limit` seconds gets a row that says
so. `--roofline` times accel's kernels one by one at the end, beside their floors
(`benchmarks.gpu_roofline`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accel
from accel.compiler.targets import target_of
from benchmarks import peer_caches
from benchmarks.bounded import OutOfTime, at_most
from benchmarks.gpu_roofline import Options, Program, Recorder, add_options, measure_all, parts_of
from benchmarks.gpu_workloads import WORKLOADS, Workload
from benchmarks.measure import RESULTS, geometric_mean, machine, merged, time_calls
from benchmarks.training import training_step

Call = Callable[..., Any]
RECORDER = Recorder()  # accel's backend, whose functions can be looked at
# A system makes two things of a workload whose model is on the GPU: the call that is checked, with
# its outputs (or the loss), and the model that it runs.
Build = Callable[[Workload], tuple[Call, nn.Module]]


def on_device(work: Workload) -> nn.Module:
    return copy.deepcopy(work.model).cuda()


def eager(work: Workload) -> tuple[Call, nn.Module]:
    model = on_device(work)
    return model, model


def inductor(mode: str | None) -> Build:
    def build(work: Workload) -> tuple[Call, nn.Module]:
        model = on_device(work)
        return torch.compile(model, mode=mode), model

    return build


def accel_compiled(work: Workload) -> tuple[Call, nn.Module]:
    if work.trains:
        model = on_device(work)
        return torch.compile(model, backend=RECORDER.backend), model
    target = target_of(torch.device("cuda"))
    return accel.compile(work.model, kwargs=work.kwargs, target=target), work.model


SYSTEMS: dict[str, Build] = {
    "eager": eager,
    "inductor-reduce-overhead": inductor("reduce-overhead"),
    "inductor": inductor(None),
    "inductor-max-autotune": inductor("max-autotune"),
    "accel": accel_compiled,
}
USUAL = [name for name in SYSTEMS if name != "inductor-max-autotune"]  # which compiles for minutes


@dataclass
class Row:
    """One system on one workload. `error` is relative to the largest output in float32, or for
    training the distance of all gradients from those in float32, relative to their length.

    `milliseconds` is None for a system that was not ready in `compile_seconds`, and those are None
    for one that did not compile from nothing (`peer_caches.row_caches`).
    """

    workload: str
    system: str
    milliseconds: float | None
    compile_seconds: float | None
    error: float | None


def tensors_of(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    values = [values] if isinstance(values, Tensor) else values
    return [v for v in values if isinstance(v, Tensor)]


def gradients(call: Call, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The loss, and all gradients in one vector."""
    model.zero_grad(set_to_none=True)
    loss = call(**inputs)
    loss.backward()
    parts = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [loss.detach().clone(), torch.cat(parts)]


def results(
    work: Workload, call: Call, model: nn.Module, inputs: Mapping[str, Tensor]
) -> list[Tensor]:
    if work.trains:
        return gradients(call, model, inputs)
    return [t.clone() for t in tensors_of(call(**inputs))]


def errors(work: Workload, got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(_error(g, e, norm=work.trains) for g, e in zip(got, exact, strict=True))


def _error(got: Tensor, exact: Tensor, *, norm: bool) -> float:
    exact = exact.double()
    size = (lambda t: t.norm()) if norm else (lambda t: t.abs().max())
    return float(size(got.double() - exact) / size(exact).clamp(min=1e-6))


def measure(name: str, systems: Sequence[str], options: Options) -> list[Row]:
    """One row of the table: every system on one workload."""
    work = WORKLOADS[name]()
    inputs = {k: v.cuda() for k, v in work.kwargs.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    grad = nullcontext() if work.trains else torch.no_grad()
    with grad, peer_caches.row_caches(options.caches, name) as fresh:
        model = on_device(work).float()
        exact = [t.cpu() for t in results(work, model, model, wide)]
        del model
        return [_measure(name, s, work, inputs, exact, options, fresh) for s in systems]


def ready(name: str) -> Callable[[str], None]:
    """Compiles a system of a workload, and runs it: for `prepare_peers`."""
    work = WORKLOADS[name]()
    inputs = {k: v.cuda() for k, v in work.kwargs.items()}

    def compile_one(system: str) -> None:
        torch._dynamo.reset()
        with nullcontext() if work.trains else torch.no_grad():
            _start(work, system, inputs)

    return compile_one


def _start(
    work: Workload, system: str, inputs: dict[str, Tensor]
) -> tuple[Call, nn.Module, list[Tensor]]:
    """A system's call, the model that it runs, and the results of the third call."""
    call, model = SYSTEMS[system](work)
    for _ in range(3):
        got = results(work, call, model, inputs)
    torch.cuda.synchronize()
    return call, model, got


def _measure(
    name: str,
    system: str,
    work: Workload,
    inputs: dict[str, Tensor],
    exact: list[Tensor],
    options: Options,
    fresh: Callable[[str], bool],
) -> Row:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    try:
        from_nothing = fresh(system)
        start = time.perf_counter()
        with at_most(options.limit):
            call, model, got = _start(work, system, inputs)
    except (OutOfTime, peer_caches.NotReady) as late:
        print(f"{name:16} {system:26} {late}", flush=True)
        if isinstance(late, OutOfTime):
            peer_caches.end_compiling()
        return Row(name, system, None, getattr(late, "seconds", options.limit), None)
    seconds = time.perf_counter() - start
    error = errors(work, [t.cpu() for t in got], exact)
    if not error <= work.bound:
        raise RuntimeError(f"{system} on {name} is off by {error}")
    timed: Call = training_step(model, call) if work.trains else call
    milliseconds = time_calls(partial(timed, **inputs))
    print(f"{name:16} {system:26} {milliseconds:8.3f} ms  compile {seconds:6.1f} s"
          f"{'' if from_nothing else ' with a cache'}  error {error:.1e}", flush=True)  # fmt: skip
    if options.programs is not None and system == "accel":
        if isinstance(call, accel.Compiled):
            parts = parts_of(call._latest()[1], ("main", list(inputs.values())))
        else:
            parts = RECORDER.record(lambda: results(work, call, model, inputs))
        options.programs.append(Program(name, parts, milliseconds))
    return Row(name, system, milliseconds, seconds if from_nothing else None, error)


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """By workload: how many times faster than the best peer accel is, and how many times faster it
    compiles than Inductor with CUDA graphs."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row["system"]] = row
    made = {}
    for name, own in found.items():
        peers = [r["milliseconds"] for s, r in own.items() if s != "accel" and r["milliseconds"]]
        if peers and own.get("accel", {}).get("milliseconds"):
            other = own.get("inductor-reduce-overhead", own["accel"])["compile_seconds"]
            mine = own["accel"]["compile_seconds"]
            made[name] = min(peers) / own["accel"]["milliseconds"], (other or mine) / mine
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(WORKLOADS))
    parser.add_argument("--systems", default=",".join(USUAL))
    add_options(parser)
    parser.add_argument("--out", default=str(RESULTS / "gpu.json"))
    chosen = parser.parse_args()
    systems, path = chosen.systems.split(","), Path(chosen.out)
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    options = Options.of(chosen)
    rows: list[Row] = []
    for name in chosen.names.split(","):
        rows += measure(name, systems, options)
        result = {
            "machine": facts,
            "target": target_of(torch.device("cuda")).name,
            "rows": merged(path, facts, [asdict(r) for r in rows], list(WORKLOADS)),
        }
        path.write_text(json.dumps(result, indent=2) + "\n")  # a later row may be cut off
    found = ratios([asdict(r) for r in rows])
    for name, (speed, compiling) in found.items():
        print(f"{name:16} {speed:.3f} of the best peer, compiles {compiling:.1f} times faster")
    if found:
        speeds = [speed for speed, _ in found.values()]
        worst = min(found, key=lambda name: found[name][0])
        print(f"geometric mean {geometric_mean(speeds):.3f}, "
              f"worst {found[worst][0]:.3f} ({worst})")  # fmt: skip
    measure_all(options.programs or [], path.with_name("gpu_roofline.json"))


if __name__ == "__main__":
    main()
