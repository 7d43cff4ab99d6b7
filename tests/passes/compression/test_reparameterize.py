"""reparameterize: fires, near misses, and the same function as the branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accel.frontends.export import capture
from accel.ir import Module, Value
from accel.passes.manager import run_pipeline
from accel.passes.reparameterize import Reparameterize
from tests.passes.compression.programs import Outcome, Program, apply, random, run


class Net(Program):
    """A program of convolution branches over one input, with fresh weights."""

    def __init__(self, channels: int = 4, size: int = 7) -> None:
        super().__init__()
        self.channels = channels
        self.x = self.input(2, channels, size, size)
        self.count = 0

    def fresh(self, *shape: int, positive: bool = False) -> Value:
        self.count += 1
        tensor = random(*shape, seed=self.count)
        return self.weight(f"p{self.count}", tensor.abs() + 0.5 if positive else tensor)

    def conv(
        self,
        kernel: tuple[int, int],
        padding: tuple[int, int],
        *,
        x: Value | None = None,
        out: int = 0,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> Value:
        out = out or self.channels
        weight = self.fresh(out, self.channels // groups, *kernel)
        return self.b.conv(
            self.x if x is None else x,
            weight,
            self.fresh(out) if bias else None,
            stride=(stride, stride),
            padding=padding,
            dilation=(dilation, dilation),
            groups=groups,
        )

    def norm(self, x: Value, affine: bool = True) -> Value:
        c = int(x.shape[1])
        return self.b.batch_norm(
            x,
            self.fresh(c),
            self.fresh(c, positive=True),
            self.fresh(c) if affine else None,
            self.fresh(c) if affine else None,
            eps=1e-5,
        )


def check(module: Module, merged: int = 1) -> Outcome:
    """Runs the pass; the function must stay the same up to one rounding of the constants."""
    shape = tuple(int(d) for d in module.main.args[0].shape)
    x = random(*shape, seed=77)
    before, before_real = run(module, x), run(module, x, oracle=True)
    outcome = apply(module, Reparameterize())
    assert outcome.rewrites == ["reparameterize"] * merged
    after_real = run(module, x, oracle=True)
    assert float((after_real - before_real).norm() / before_real.norm()) < 1e-7
    torch.testing.assert_close(run(module, x), before, rtol=1e-4, atol=1e-4)
    return outcome


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_repvgg_block_becomes_one_convolution(groups: int) -> None:
    p = Net()
    a = p.norm(p.conv((3, 3), (1, 1), groups=groups))
    c = p.norm(p.conv((1, 1), (0, 0), groups=groups))
    identity = p.norm(p.x)
    outcome = check(p.done(p.b.relu(p.b.add(p.b.add(a, c), identity))))
    assert [n for n in outcome.ops() if n != "constant"] == ["conv", "relu", "return"]
    assert outcome.module.weights.names() == ["p1.merged", "p1.merged.bias"]
    assert outcome.module.weights.type("p1.merged").shape == (4, 4 // groups, 3, 3)


def test_folded_batch_norms_are_read_as_biases_products_and_sums() -> None:
    p = Net()
    a = p.conv((3, 3), (1, 1), bias=True)
    c = p.conv((1, 1), (0, 0), bias=True)
    scaled = p.b.mul(p.x, p.fresh(4, 1, 1))
    identity = p.b.sub(p.fresh(1, 4, 1, 1), scaled)
    shifted = p.b.add(scaled, p.fresh(4, 1, 1))
    halved = p.b.mul(p.b.scalar(0.5, torch.float32), p.b.sub(c, p.fresh(4, 1, 1)))
    total = p.b.add(identity, p.b.add(p.b.add(halved, shifted), a))
    outcome = check(p.done(total))
    # constant - x is no product with a positive sign: that branch stays, and keeps its own input.
    assert outcome.ops().count("conv") == 1 and outcome.ops().count("sub") == 1


def test_a_plain_residual_is_an_identity_branch() -> None:
    p = Net()
    outcome = check(p.done(p.b.add(p.x, p.conv((3, 3), (1, 1)))))
    assert outcome.ops() == ["constant", "conv", "return"]


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_branches_merge_without_the_identity(stride: int) -> None:
    p = Net(size=8)
    a = p.norm(p.conv((3, 3), (1, 1), out=6, stride=stride), affine=False)
    c = p.norm(p.conv((1, 1), (0, 0), out=6, stride=stride))
    check(p.done(p.b.add(a, c)))


def test_channels_last_branches_merge() -> None:
    p = Program()
    x = p.input(2, 7, 7, 4)
    attributes = {"stride": (1, 1), "dilation": (1, 1), "layout": "nhwc"}
    a = p.b.conv(x, p.weight("a", random(4, 4, 3, 3)), padding=(1, 1), **attributes)
    c = p.b.conv(x, p.weight("c", random(4, 4, 1, 1)), padding=(0, 0), **attributes)
    identity = p.b.add(p.b.mul(x, p.weight("s", random(4))), p.weight("t", random(1, 1, 1, 4)))
    outcome = check(p.done(p.b.add(p.b.add(a, identity), c)))
    assert [n for n in outcome.ops() if n != "constant"] == ["conv", "return"]
    assert 'layout = "nhwc"' in outcome.text


def test_asymmetric_kernels_lie_in_the_square_one() -> None:
    p = Net()
    square, flat = p.conv((3, 3), (1, 1)), p.conv((1, 3), (0, 1))
    tall = p.conv((3, 1), (1, 0), bias=True)
    outcome = check(p.done(p.b.add(p.b.add(square, flat), tall)))
    assert outcome.module.weights.type("p1.merged").shape == (4, 4, 3, 3)


def test_dilated_and_pointwise_branches_merge() -> None:
    p = Net(size=9)
    check(p.done(p.b.add(p.conv((3, 3), (2, 2), dilation=2), p.conv((1, 1), (0, 0)))))


def test_many_equal_branches_and_a_foreign_term() -> None:
    p = Net()
    foreign = p.b.relu(p.x)
    total = p.b.add(p.conv((3, 3), (1, 1)), foreign)
    for _ in range(3):
        total = p.b.add(p.norm(p.conv((3, 3), (1, 1))), total)
    outcome = check(p.done(total))
    assert sorted(n for n in outcome.ops() if n != "constant") == ["add", "conv", "relu", "return"]


def test_blocks_in_sequence_merge_one_by_one() -> None:
    p = Net()
    x = p.x
    for _ in range(3):
        a = p.norm(p.conv((3, 3), (1, 1), x=x))
        c = p.norm(p.conv((1, 1), (0, 0), x=x))
        x = p.b.relu(p.b.add(p.b.add(a, c), p.norm(x)))
    outcome = check(p.done(x), merged=3)
    assert outcome.ops().count("conv") == 3 and "batch_norm" not in outcome.ops()


def test_it_equals_a_torch_repvgg_block() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    point = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    identity = nn.BatchNorm2d(4)
    for norm in (dense[1], point[1], identity):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.eval()
    p = Net()

    def stored(name: str, tensor: Tensor) -> Value:
        return p.weight(name, tensor.detach().clone())

    def norm(x: Value, module: nn.BatchNorm2d, name: str) -> Value:
        tensors = (module.running_mean, module.running_var, module.weight, module.bias)
        values = [stored(f"{name}{i}", t) for i, t in enumerate(tensors)]
        return p.b.batch_norm(x, *values, eps=module.eps)

    terms = []
    for name, branch in (("dense", dense), ("point", point)):
        y = p.b.conv(
            p.x,
            stored(name, branch[0].weight),
            stride=(1, 1),
            padding=branch[0].padding,
            dilation=(1, 1),
        )
        terms.append(norm(y, branch[1], name))
    module = p.done(p.b.add(p.b.add(*terms), norm(p.x, identity, "identity")))
    x = random(2, 4, 7, 7, seed=5)
    with torch.no_grad():
        wanted = dense(x) + point(x) + identity(x)
    apply(module, Reparameterize())
    assert [op.name for op in module.main.ops].count("conv") == 1
    torch.testing.assert_close(run(module, x), wanted, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A RepVGG block of training time."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.dense = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.dense_norm = nn.BatchNorm2d(outputs)
        self.point = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)
        self.point_norm = nn.BatchNorm2d(outputs)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense_norm(self.dense(x)) + self.point_norm(self.point(x))
        return torch.relu(y if self.identity is None else y + self.identity(x))


@pytest.mark.parametrize(
    "pipeline",
    [
        "reparameterize",
        "canonicalize,reparameterize,fold,dce",
        "fold_batch_norm,reparameterize,canonicalize,dce",
        "canonicalize,fold_batch_norm,canonicalize,fold,reparameterize,dce",
    ],
)
def test_a_captured_network_becomes_plain(pipeline: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(3, 8, 2), Block(8, 8, 1), Block(8, 16, 2, 2), Block(16, 16, 1, 2))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = random(2, 3, 16, 16)
    program = capture(net.eval(), (x,))
    ledger = run_pipeline(program, pipeline, validate=True)
    assert next(r for r in ledger.rows if r.name == "reparameterize").total_rewrites == 4
    names = [op.name for op in program.main.ops if op.name != "constant"]
    assert names == ["conv", "relu"] * 4 + ["return"]
    with torch.no_grad():
        torch.testing.assert_close(run(program, x), net(x), rtol=1e-4, atol=1e-4)


def near_misses() -> dict[str, tuple[Net, Value, str]]:
    """Sums that look alike, and what the pass says about them ("" for nothing)."""
    cases = {}
    p = Net()
    cases["another input"] = (
        p, p.b.add(p.conv((3, 3), (1, 1)), p.conv((1, 1), (0, 0), x=p.b.relu(p.x))), "",
    )  # fmt: skip
    p = Net()
    branch = p.conv((3, 3), (1, 1))
    both = p.b.add(branch, p.conv((1, 1), (0, 0)))
    cases["a second reader"] = (p, p.b.mul(both, branch), "other readers")
    p = Net()
    cases["another dilation"] = (
        p,
        p.b.add(p.conv((3, 3), (2, 2), dilation=2), p.conv((3, 3), (1, 1))),
        "dilations [1, 2]",
    )
    p = Net()
    cases["other groups"] = (
        p, p.b.add(p.conv((3, 3), (1, 1), groups=2), p.conv((1, 1), (0, 0))), "",
    )  # fmt: skip
    p = Net()
    cases["a dearer kernel"] = (
        p, p.b.add(p.conv((1, 3), (0, 1)), p.conv((3, 1), (1, 0))), "costs more",
    )  # fmt: skip
    p = Net(size=7)
    cases["a broadcast"] = (p, p.b.add(p.conv((3, 3), (1, 1)), p.conv((7, 7), (0, 0))), "")
    p = Net()
    weight = p.input(4, 4, 3, 3)
    live = p.b.conv(p.x, weight, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    cases["a weight that is an input"] = (p, p.b.add(live, p.conv((1, 1), (0, 0))), "not stored")
    p = Net()
    cases["a product"] = (p, p.b.mul(p.conv((3, 3), (1, 1)), p.conv((1, 1), (0, 0))), "")
    p = Net(channels=7)
    along_width = p.b.mul(p.x, p.fresh(7))
    cases["factors along the width"] = (p, p.b.add(p.conv((3, 3), (1, 1)), along_width), "")
    p = Net(size=9)
    cases["paddings off the dilation's grid"] = (
        p,
        p.b.add(p.conv((3, 3), (2, 2), dilation=2), p.conv((4, 4), (3, 3), dilation=2)),
        "no multiple of dilation",
    )
    return cases


@pytest.mark.parametrize("case", list(near_misses()))
def test_near_misses_stay(case: str) -> None:
    p, total, said = near_misses()[case]
    module = p.done(total)
    before = [op.name for op in module.main.ops]
    outcome = apply(module, Reparameterize())
    assert outcome.rewrites == [] and outcome.ops() == before
    assert any(said in miss for miss in outcome.misses) if said else True


def test_fuel_leaves_the_second_block() -> None:
    p = Net()
    x = p.b.relu(p.b.add(p.conv((3, 3), (1, 1)), p.conv((1, 1), (0, 0))))
    y = p.b.add(p.conv((3, 3), (1, 1), x=x), p.conv((1, 1), (0, 0), x=x))
    module = p.done(y)
    outcome = apply(module, Reparameterize(), fuel=1)
    assert len(outcome.rewrites) == 1 and outcome.ops().count("conv") == 3


def test_the_contract_says_constants_are_stored() -> None:
    assert Reparameterize.contract.kind == "exact" and Reparameterize.contract.stores_constants
