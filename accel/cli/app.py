"""The `accel` command: which verbs there are, and `main`.

Each verb is a module of this package with a Typer app called `app`. `VERBS` names them with their
help line, so that `accel --help` and completion import none of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from accel import __version__
from accel.cli.output import fail
from accel.errors import AccelError, OptionError

VERBS: dict[str, str] = {
    "compile": "Compile a model into an artifact.",
    "run": "Run an artifact on files or on random inputs.",
    "generate": "Generate text with an artifact of a language model.",
    "bench": "Time an artifact or a model beside eager PyTorch and its peers.",
    "tune": "Time kernels on this machine's GPU, and keep the fastest in the artifact.",
    "inspect": "Show what is inside an artifact: entry points, plan, kernels, IR.",
    "explain": "Show what each pass did, as a waterfall, and what nearly happened.",
    "verify": "Replay an artifact's golden vectors on this machine.",
    "opt": "Run passes over IR text, as mlir-opt does.",
    "bisect": "Find the rewrite that makes an output wrong.",
    "doctor": "Say what is installed and what each backend can do here.",
    "keys": "Show your signing key, and trust others'.",
    "cache": "Show or clear the compile cache.",
    "passes": "List the passes, their contracts and options.",
    "ops": "List the IR's ops.",
    "targets": "List the targets that code can be made for.",
}

# What Typer raises for a wrong command line: the base of its public BadParameter.
_UsageError: type[Any] = typer.BadParameter.__mro__[2]


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they run; until then they are names and help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in, enough for help and completion; `resolve_command` finds the real one."""
        if cmd_name not in VERBS:
            return None
        app = typer.Typer(add_completion=False)
        app.command(name=cmd_name, help=VERBS[cmd_name])(_stand_in)
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in VERBS:
            return super().resolve_command(ctx, args)
        return name, load_verb(name), args[1:]


def _stand_in() -> None:
    """Takes the place of a command that is not loaded."""


def load_verb(name: str) -> Any:
    """The command object of a verb; imports its module."""
    module = importlib.import_module(f"accel.cli.{name}")
    command = typer.main.get_command(module.app)
    command.name = name
    command.help = command.help or VERBS[name]
    return command


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"accel {__version__}")
        raise typer.Exit


@app.callback(help="accel compiles PyTorch models to fast, checked, portable artifacts.")
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or the error's exit code (docs/cli.md lists them)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    as_json = "--json" in given
    try:
        code = command.main(args=given, prog_name="accel", standalone_mode=False)
    except AccelError as error:
        sys.exit(fail(error, as_json))
    except _UsageError as error:
        place = error.ctx.command_path if getattr(error, "ctx", None) else "accel"
        message = error.format_message() or "no command"
        sys.exit(fail(OptionError(message, advice=f"{place} --help"), as_json))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`accel ... | head`); keep Python from complaining at exit.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a file that somebody named
        if error.filename is None:
            raise
        what = f"cannot use '{error.filename}': {error.strerror}"
        sys.exit(fail(OptionError(what, advice="check the path and its permissions"), as_json))
    sys.exit(code if isinstance(code, int) else 0)
