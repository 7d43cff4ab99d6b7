"""accel: a deep-learning graph compiler whose every technique is a pass with a checked contract."""

__version__ = "0.1.0"
