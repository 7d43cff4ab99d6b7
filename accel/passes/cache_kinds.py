"""Kinds of key/value caches by name: `cache="int8"`, `cache="int4,paged"`, or passes with options.

    before, after = cache_passes("int8,page_cache{page=32}")

Some kinds rewrite the forward, before `insert_kv_cache` gives it its state, others the state.
"""

from __future__ import annotations

import re

from accel.errors import OptionError
from accel.names import near
from accel.passes.base import Pass
from accel.passes.page_cache import PageCache
from accel.passes.pipeline import parse_pipeline
from accel.passes.registry import load_passes

KINDS = {
    "int8": "quantize_cache{format=int8}",
    "fp8": "quantize_cache{format=fp8}",
    "int4": "quantize_cache{format=int4}",
    "paged": "page_cache",
    "sinks": "stream_cache",
    "h2o": "evict_cache",
}
# What keeps another set of tokens than all of them leaves nothing for the others to work on.
_ALONE = ("stream_cache", "evict_cache")


def cache_passes(text: str) -> tuple[list[Pass], list[Pass]]:
    """The passes before and after `insert_kv_cache` of a comma-separated list of kinds and passes.

    Raises OptionError for an unknown name, and for kinds that contradict each other.
    """
    names = [n.strip() for n in re.split(r",(?![^{]*\})", text)] if text.strip() else []
    passes: list[Pass] = []
    for name in names:
        bare = name.partition("{")[0].strip()
        if name not in KINDS and bare not in load_passes():
            known = (*KINDS, *load_passes())
            raise OptionError(f"no kind of cache named '{name}'", advice=near(name, known))
        passes += parse_pipeline(KINDS.get(name, name))
    for kind in {type(p) for p in passes if p.name.endswith("_cache")}:
        if sum(isinstance(p, kind) for p in passes) > 1:
            raise OptionError(f"the cache '{text}' names {kind.name} twice")
    for p in passes:
        if p.name in _ALONE and len(passes) > 1:
            others = ", ".join(o.name for o in passes if o is not p)
            raise OptionError(
                f"the cache '{text}' contradicts itself: {p.name} keeps tokens its own way, and "
                f"{others} cannot be added to that",
                advice="choose one of them",
            )
    after: list[Pass] = [p for p in passes if isinstance(p, PageCache)]
    return [p for p in passes if p not in after], after
