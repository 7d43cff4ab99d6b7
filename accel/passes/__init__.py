"""Passes: one technique a file.

Start at `accel.passes.base` (what a pass is), then `accel.passes.manager` (what runs them), and
docs/writing_a_pass.md. `accel.passes.pipelines` lists the default pipelines. A pass registers
itself by name; `accel.passes.registry` finds all of them.
"""
