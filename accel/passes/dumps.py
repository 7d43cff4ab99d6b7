"""Numbered IR dumps: `00_input.mlir`, `01_canonicalize.mlir`, ... in one folder."""

from __future__ import annotations

import re
from pathlib import Path

from accel.errors import OptionError
from accel.ir.module import Module
from accel.ir.printer import print_module


class Dumps:
    """Writes the module after each pass. Numbers count passes, so a dump's name is its place."""

    def __init__(self, folder: str | Path, *, locations: bool = False) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"cannot make the folder for dumps '{folder}': {error.strerror}",
                advice="name a folder that can be written",
            ) from error
        self.locations = locations

    def write(self, index: int, name: str, module: Module) -> Path:
        """Writes one dump, e.g. `03_fuse.mlir`; returns its path."""
        safe = re.sub(r"[^\w.-]+", "_", name)
        path = self.folder / f"{index:02d}_{safe}.mlir"
        path.write_text(print_module(module, locations=self.locations))
        return path
