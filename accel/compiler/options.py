"""One typed options object for everything that compiles."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.errors import OptionError


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        passes: techniques to apply after the exact clean-up, as pipeline text, for example
            "quantize{bits=8}" or "low_rank{energy=0.99}".
        pipeline: replaces the whole tensor-level pipeline, as pipeline text ("" is none).
        validate: check each pass's contract on random (or calibration) inputs. Slow, exact.
        on_violation: "raise" fails the compile when a lossy pass is past its bound, "undo"
            takes the pass back.
        kernels: generate kernels for what vendor libraries do not take.
        cache: use the persistent compile cache.
        tune: measure on the device how each generated kernel is computed best: "quick" (about a
            minute at most), "full" (ten), or "off" (the cost model chooses).
        float32: how generated kernels for GPUs multiply float32: "exact", "tf32" (operands are
            rounded to 11 bits), or "torch": what `torch.set_float32_matmul_precision` says when
            the model is compiled.
        dynamic: for `torch.compile`: treat sizes as symbols.
        dump_dir: folder for numbered IR dumps ("" is none).
        print_after: pass name after which the IR is printed ("*" after each).
        stop_after: pass name after which the pipeline stops.
        fuel: how many rewrites may happen (-1: all); for bisection.
        golden: record golden inputs and outputs in packaged artifacts.
    """

    passes: str = ""
    pipeline: str | None = None
    validate: bool = False
    on_violation: str = "raise"
    kernels: bool = True
    cache: bool = True
    tune: str = "off"
    float32: str = "torch"
    dynamic: bool | None = None
    dump_dir: str = ""
    print_after: str = ""
    stop_after: str = ""
    fuel: int = -1
    golden: bool = True

    @staticmethod
    def of(value: Options | Mapping[str, Any] | None) -> Options:
        """Options from a mapping. Raises OptionError for unknown names and wrong types."""
        if value is None:
            return Options()
        if isinstance(value, Options):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(
                f"options are a {type(value).__name__}, not a mapping",
                advice='give a dict such as {"passes": "quantize{bits=8}"}, or accel.Options(...)',
            )
        fields = {f.name: f for f in dataclasses.fields(Options)}
        for name, given in value.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 3) or sorted(fields)
                raise OptionError(
                    f"no option named '{name}'", advice=f"did you mean: {', '.join(near)}"
                )
            default = getattr(Options(), name)
            if default is not None and not isinstance(given, type(default)):
                raise OptionError(
                    f"option '{name}' must be {type(default).__name__}, got {given!r}",
                    advice=f"its default is {default!r}",
                )
        chosen = Options(**value)
        if chosen.on_violation not in ("raise", "undo"):
            raise OptionError(f"on_violation = '{chosen.on_violation}'", advice="raise or undo")
        if chosen.tune not in ("off", "quick", "full"):
            raise OptionError(f"tune = '{chosen.tune}'", advice="off, quick or full")
        if chosen.fuel < -1:
            raise OptionError(f"fuel = {chosen.fuel}", advice="a number of rewrites, or -1: all")
        if chosen.float32 not in ("exact", "tf32", "torch"):
            raise OptionError(f"float32 = '{chosen.float32}'", advice="exact, tf32 or torch")
        return chosen


def list_options() -> dict[str, Any]:
    """Every option's name and default."""
    return {f.name: getattr(Options(), f.name) for f in dataclasses.fields(Options)}
