"""Short programs that use accel, each run by a test. Start with compile.py."""
