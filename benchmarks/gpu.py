"""Whole models on one GPU beside eager PyTorch and Inductor: time of a call, compile time, error.

    python -m benchmarks.gpu [--names bert_b1,bert_b32] [--out FILE]

All systems run in this process, on the same inputs, one after another; CUDA graphs are allowed to
all. A figure is the median of many calls between two CUDA events. Each system's outputs are
compared with eager float32 before it is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accel
from benchmarks.measure import RESULTS, machine

ROUNDS, CALLS = 15, 20
LARGEST_ERROR = 3e-2  # of the largest output, against float32: half precision over 12 layers
LARGEST_BFLOAT16_ERROR = 8e-2  # three bits fewer, over 16 layers


@dataclass
class Workload:
    """A model in 16 bits, the arguments of one call, and the largest error that is no failure."""

    model: nn.Module
    kwargs: dict[str, Tensor]
    bound: float = LARGEST_ERROR


def bert(batch: int) -> Workload:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).half().eval()
    return Workload(model, {"input_ids": torch.randint(0, 30000, (batch, 128))})


def vit(batch: int) -> Workload:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig()).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def resnet(batch: int) -> Workload:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig()).half().eval()
    return Workload(model, {"pixel_values": torch.randn(batch, 3, 224, 224).half()})


def llama_step(batch: int) -> Workload:
    """Llama-3.2-1B's shape, one token without a cache: the linears of a decode step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    inputs = {"input_ids": torch.randint(0, 128256, (batch, 1))}
    return Workload(model.cpu(), inputs, bound=LARGEST_BFLOAT16_ERROR)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "bert_b1": lambda: bert(1),
    "bert_b32": lambda: bert(32),
    "vit_b1": lambda: vit(1),
    "vit_b64": lambda: vit(64),
    "llama1b_step_b1": lambda: llama_step(1),
    "resnet50_b1": lambda: resnet(1),
    "resnet50_b64": lambda: resnet(64),
}

Call = Callable[..., Any]


def eager(work: Workload, target: str) -> Call:
    return copy.deepcopy(work.model).cuda()


def inductor(mode: str | None) -> Callable[[Workload, str], Call]:
    def build(work: Workload, target: str) -> Call:
        torch._dynamo.reset()
        return torch.compile(copy.deepcopy(work.model).cuda(), mode=mode)

    return build


def accel_compiled(work: Workload, target: str) -> Call:
    return accel.compile(work.model, kwargs=work.kwargs, target=target, options={"cache": False})


SYSTEMS: dict[str, Callable[[Workload, str], Call]] = {
    "eager": eager,
    "inductor": inductor(None),
    "inductor-reduce-overhead": inductor("reduce-overhead"),
    "accel": accel_compiled,
}


@dataclass
class Row:
    """One system on one workload. `error` is relative to the largest output in float32."""

    workload: str
    system: str
    milliseconds: float
    compile_seconds: float
    error: float


def tensors_of(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [v for v in values if isinstance(v, Tensor)]


def time_calls(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(CALLS):
            call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / CALLS)
    return statistics.median(times)


def measure(name: str, target: str) -> list[Row]:
    work = WORKLOADS[name]()
    inputs = {k: v.cuda() for k, v in work.kwargs.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    rows: list[Row] = []
    with torch.no_grad():
        exact = tensors_of(copy.deepcopy(work.model).cuda().float()(**wide))
        for system, build in SYSTEMS.items():
            start = time.perf_counter()
            call = build(work, target)
            for _ in range(3):
                got = tensors_of(call(**inputs))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            error = max(_error(g, e) for g, e in zip(got, exact, strict=True))
            if error > work.bound:
                raise RuntimeError(f"{system} on {name} is off by {error}")
            row = Row(name, system, time_calls(partial(call, **inputs)), seconds, error)
            rows.append(row)
            print(f"{name:10} {system:26} {row.milliseconds:8.3f} ms  compile {seconds:6.1f} s  "
                  f"error {error:.1e}", flush=True)  # fmt: skip
    return rows


def _error(got: Tensor, exact: Tensor) -> float:
    scale = exact.double().abs().max().clamp(min=1e-6)
    return float((got.double() - exact.double()).abs().max() / scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(WORKLOADS))
    parser.add_argument("--out", default=str(RESULTS / "gpu.json"))
    chosen = parser.parse_args()
    device = torch.cuda.get_device_name()
    target = "h200" if "H200" in device else "h100"
    rows = [row for name in chosen.names.split(",") for row in measure(name, target)]
    for name in chosen.names.split(","):
        own = {r.system: r.milliseconds for r in rows if r.workload == name}
        peer = min(v for k, v in own.items() if k != "accel")
        print(f"{name:10} accel {own['accel']:.3f} ms, best peer {peer:.3f} ms, "
              f"ratio {peer / own['accel']:.3f}")  # fmt: skip
    facts = {**machine(), "gpu": device}
    result = {"machine": facts, "target": target, "rows": [asdict(r) for r in rows]}
    Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
