"""Writes instructions in PTX in their form for pairs of programs, which Triton cannot express.

Programs of a cluster run at the same time on neighbouring multiprocessors, and can write to each
other's shared memory. A source marks what is meant for both programs of a pair by a line of
assembly before it, which is a comment for Triton:

    BOTH       before a copy of a tile to shared memory: to the same place in both programs
    EVERYONE   before an arrival at a barrier: also at the other program's

and has all threads of both programs execute MEET before the first of these, so that both programs
are there, and their barriers ready. See "Asynchronous copy" and "mbarrier" in the PTX manual.

LLVM takes equal lines of assembly out of the two sides of a branch. Marks there must differ in what
follows (a number, say); one that has been moved away from its instruction is an error.
"""

from __future__ import annotations

import re

from accel.errors import BackendError

BOTH, EVERYONE = "// for both programs:", "// for every program:"
MEET = ("fence.mbarrier_init.release.cluster; barrier.cluster.arrive.release; "
        "barrier.cluster.wait.acquire;")  # fmt: skip
_ELSEWHERE = re.compile(r"^\$\w+:|^\s*(?:@!?%p\d+\s+)?bra\b")  # a label, or a jump
_THREADS = re.compile(r"^(\.reqntid .*)$", re.M)
_COPY = re.compile(
    r"(?P<guard>@%p\d+\s+)?cp\.async\.bulk\.tensor\.2d\.shared::(?:cluster|cta)\.global"
    r"\.mbarrier::complete_tx::bytes (?P<operands>\[.*\]);"
)
_ARRIVE = re.compile(
    r"(?P<guard>@%p\d+\s+)?mbarrier\.arrive\.shared(?:::cta)?\.b64\s+_, \[(?P<address>%r\d+)\]"
    r"(?:, 1)?;"
)


def paired(ptx: str) -> str:
    """The PTX with what is marked in its form for a pair; unchanged if nothing is marked.

    Raises BackendError if a mark is not followed by what it belongs to.
    """
    if BOTH not in ptx and EVERYONE not in ptx:
        return ptx
    lines = ptx.splitlines()
    pending = ""
    for number, line in enumerate(lines):
        for mark in (BOTH, EVERYONE):
            if mark in line:
                if pending:
                    raise BackendError(f"two marks without an instruction in between: {line}")
                pending = mark
        if not pending:
            continue
        if _ELSEWHERE.search(line):
            raise BackendError(f"{pending!r} is not in front of its instruction in Triton's PTX")
        found = (_COPY if pending == BOTH else _ARRIVE).search(line)
        if found is not None:
            lines[number] = _copied(found) if pending == BOTH else _arrived(found)
            pending = ""
    if pending:
        raise BackendError(f"no instruction after {pending!r} in Triton's PTX")
    made, count = _THREADS.subn(r"\1\n.reqnctapercluster 2, 1, 1", "\n".join(lines) + "\n")
    if count != 1:
        raise BackendError("Triton's PTX does not say how many threads a program has")
    return made


def _copied(found: re.Match[str]) -> str:
    return (
        "\t{\n\t.reg .b16 programs;\n\tmov.b16 programs, 3;\n"
        f"\t{found['guard'] or ''}cp.async.bulk.tensor.2d.shared::cluster.global"
        f".mbarrier::complete_tx::bytes.multicast::cluster {found['operands']}, programs;\n\t}}"
    )


def _arrived(found: re.Match[str]) -> str:
    return (
        f"\t{found[0]}\n\t{{\n\t.reg .b32 other, there;\n"
        "\tmov.u32 other, %cluster_ctarank;\n\txor.b32 other, other, 1;\n"
        f"\tmapa.shared::cluster.u32 there, {found['address']}, other;\n"
        f"\t{found['guard'] or ''}mbarrier.arrive.shared::cluster.b64 _, [there];"
        "\n\t}"
    )
