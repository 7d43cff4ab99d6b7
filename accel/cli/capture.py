"""From a model on the command line to a captured module."""

from __future__ import annotations
