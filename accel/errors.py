"""Every error that accel raises on purpose: a stable id, what happened, where, what to do.

Catch `AccelError` for all of them. The `id` never changes between releases; the text may.
"""

from __future__ import annotations

from typing import ClassVar


class AccelError(Exception):
    """Base of all typed errors.

    `what` is one sentence, `where` a place in the user's model or file (may be empty), and `advice`
    says what the user can do about it (may be empty).
    """

    id: ClassVar[str] = "ACCEL000"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", advice: str = "") -> None:
        self.what, self.where, self.advice = what, where, advice
        super().__init__(what)

    def __str__(self) -> str:
        text = f"[{self.id}] {self.what}"
        if self.where:
            text += f"\n  at: {self.where}"
        if self.advice:
            text += f"\n  try: {self.advice}"
        return text

    def to_json(self) -> dict[str, str]:
        return {"id": self.id, "what": self.what, "where": self.where, "advice": self.advice}


class OptionError(AccelError):
    """An unknown pass, option, target or an option value that does not fit."""

    id = "ACCEL001"
    exit_code = 2


class CaptureError(AccelError):
    """The model could not be turned into one graph (control flow, data-dependent shapes...)."""

    id = "ACCEL010"
    exit_code = 3


class FixedSizeError(CaptureError):
    """A size that was declared dynamic is a number to the model: it counts to it, or compares."""

    id = "ACCEL012"


class InputError(AccelError):
    """A call's inputs do not fit what was compiled (structure, shape, dtype, device)."""

    id = "ACCEL011"
    exit_code = 3


class IRParseError(AccelError):
    """IR text with an error; `where` holds file:line:column and a caret line."""

    id = "ACCEL020"
    exit_code = 4


class VerifyError(AccelError):
    """A program breaks a rule of the IR: SSA order, types, attributes."""

    id = "ACCEL021"
    exit_code = 4


class TypeInferenceError(VerifyError):
    """An op's operands or attributes do not fit its definition."""

    id = "ACCEL022"


class InterpretError(AccelError):
    """The reference interpreter cannot run a program with these inputs."""

    id = "ACCEL023"
    exit_code = 4


class ContractError(AccelError):
    """A pass broke its promise."""

    id = "ACCEL030"
    exit_code = 5


class RewriteError(AccelError):
    """A rewrite rule is malformed, does not terminate, or builds a value of another type."""

    id = "ACCEL031"
    exit_code = 5


class BackendError(AccelError):
    """A backend cannot make code for something, or its toolchain failed."""

    id = "ACCEL040"
    exit_code = 6


class MissingDependencyError(AccelError):
    """An optional package is needed and not installed."""

    id = "ACCEL041"
    exit_code = 6


class ArtifactError(AccelError):
    """An artifact is damaged, foreign, too large, or of another format version."""

    id = "ACCEL050"
    exit_code = 7


class TrustError(ArtifactError):
    """An artifact's host code is not signed by a key that this user trusts."""

    id = "ACCEL051"
    exit_code = 8


class VerificationFailedError(AccelError):
    """`accel verify`: golden vectors do not replay on this machine."""

    id = "ACCEL052"
    exit_code = 9


class ExecutionError(AccelError):
    """A step of a compiled function failed; `where` names the step and its source."""

    id = "ACCEL053"
    exit_code = 10


class OutOfMemoryError(ExecutionError):
    """A device has not enough memory for a call. What calls had kept there was given back."""

    id = "ACCEL054"
    exit_code = 11


class PagesError(ExecutionError):
    """A pool of cache pages has none left, or none of what a text needs."""

    id = "ACCEL055"
    exit_code = 10
