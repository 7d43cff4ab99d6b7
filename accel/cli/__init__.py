"""The command line: `accel compile | run | bench | inspect | explain | verify | opt ...`.

Start at `app.py` (the commands, how they load) and `output.py` (text, JSON, errors). A command is
one file; it is imported only when it runs, so `accel --help` does not import torch.
"""

from accel.cli.app import main

__all__ = ["main"]
