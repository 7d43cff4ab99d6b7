"""What the GPU benchmarks do around their timing: peers' caches, rows without a time, rooflines."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import accel
from benchmarks import docs_gpu, docs_gpu_decode, gpu, peer_caches
from benchmarks.gpu_roofline import Program, Recorder, figures, parts_of
from benchmarks.prepare_peers import alone_with

FACTS = {"gpu": "G", "packages": {"torch": "2", "transformers": "5"}}


def row(system: str, milliseconds: float | None, seconds: float | None) -> gpu.Row:
    return gpu.Row("8b_decode", system, milliseconds, seconds, 1e-3 if milliseconds else None)


ROWS = [
    row("inductor", 3.0, None), row("inductor-reduce-overhead", 2.5, 20.0),
    row("inductor-max-autotune", None, 90.0), row("accel", 2.0, 5.0),
]  # fmt: skip


def test_a_peer_that_is_late_has_no_time_and_no_ratio() -> None:
    made = [vars(r) for r in ROWS]
    assert gpu.ratios(made) == {"8b_decode": (1.25, 4.0)}
    assert gpu.ratios(made[:3]) == {} and gpu.ratios(made[2:]) == {}
    data = {"machine": FACTS, "rows": made}
    page = "\n".join(docs_gpu.gpu_lines(data))
    assert "| 8b_decode | 3.000 | 2.500 | not ready in 90 s | 2.000 | 1.25 |" in page
    assert "| 8b_decode | 1e-03 | 20.0 s, 1e-03 |  | 5.0 s, 1e-03 |" in page
    page = "\n".join(docs_gpu_decode.decode_lines(data))
    assert "| 8b_decode | 3.000 | 2.500 | not ready in 90 s | 2.000 | 1.25 |" in page
    assert "| worst: 8b_decode |  |  |  |  | 1.25 |" in page
    lines = docs_gpu.readme_lines(data)
    assert lines[2].endswith("| 2.00 | Inductor, reduce-overhead | 2.50 | 1.25 |")
    assert lines[-2:] == [
        "| geometric mean |  |  |  | 1.25 |",
        "| worst: 8B Llama, a token after 1024 |  |  |  | 1.25 |",
    ]


def test_a_folder_says_what_was_kept_and_what_was_late(tmp_path: Path) -> None:
    assert not peer_caches.load(None, "bert_b1", "inductor")
    assert not peer_caches.load(tmp_path, "bert_b1", "inductor")
    peer_caches.save_late(tmp_path, "bert_b1", "inductor", 7)
    with pytest.raises(peer_caches.NotReady, match="7 s") as caught:
        peer_caches.load(tmp_path, "bert_b1", "inductor")
    assert caught.value.seconds == 7
    assert not peer_caches.load(tmp_path, "bert_b1", "inductor-max-autotune")
    (tmp_path / "vit_b1.inductor.cache").write_bytes(b"no cache")
    peer_caches.save_late(tmp_path, "vit_b1", "inductor", 7)  # it was ready before
    with pytest.raises(RuntimeError, match="not a cache"):
        peer_caches.load(tmp_path, "vit_b1", "inductor")


def test_one_peer_of_a_row_compiles_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", "outside")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    systems = ["eager", "inductor-reduce-overhead", "inductor", "inductor-max-autotune", "accel"]
    for _ in range(2):
        with peer_caches.row_caches(None, "bert_b1") as fresh:
            assert [fresh(s) for s in systems] == [True, True, False, False, True]
            folder = Path(os.environ["ACCEL_CACHE_DIR"])
            assert folder.is_dir() and os.environ["TRITON_CACHE_DIR"] == f"{folder}/triton"
        assert os.environ["ACCEL_CACHE_DIR"] == "outside" and not folder.exists()
        assert "TRITON_CACHE_DIR" not in os.environ


def test_one_process_at_a_time_has_the_device(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    alone = alone_with(path)
    with path.open("w") as other:
        with alone(), alone(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_rooflines_of_a_program() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3)]
    x = torch.randn(8, 64)
    fast = accel.compile(nn.Sequential(*layers).eval(), inputs=(x,))
    made = figures(Program("bert_b1", parts_of(fast._latest()[1], ("main", [x])), 0.5))
    assert made["matched"] and made["call_us"] == 500
    assert made["share"] == pytest.approx(made["floor_us"] / 500)
    assert made["flops"] >= 3 * 2 * 8 * 64 * 64 and len(made["furthest"]) <= 3
    lost = [k["time_us"] - k["floor_us"] for k in made["furthest"]]
    assert lost == sorted(lost, reverse=True)
    for name, total in (("floor_us", made["floor_us"]), ("time_us", made["steps_us"])):
        assert sum(k[name] for k in made["kernels"]) == pytest.approx(total)
    data = {"machine": FACTS, "bandwidth": 4.3e12, "peak_flops": {"float16": 7e14}, "rows": [made]}
    lines = docs_gpu.roofline_lines(data)
    assert any(line.startswith("| bert_b1 | ") and "linear" in line for line in lines)


def test_a_training_step_is_recorded_with_its_arguments() -> None:
    torch.manual_seed(0)
    recorder, model = Recorder(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    call, x = torch.compile(model, backend=recorder.backend), torch.randn(8, 16)

    def step() -> None:
        call(x).sum().backward()

    step()
    parts = recorder.record(step)
    assert len(parts) == 2 and recorder.parts is None  # forward, backward
    made = figures(Program("gpt2_train_b8", parts, 0.5))
    products = 2 * 8 * 16 * 32
    assert made["matched"] and made["flops"] >= 2 * products + 3 * products
