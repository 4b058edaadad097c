"""Benchmarks: `python -m benchmarks NAME`. Each measures a flow beside a yardstick, in one run on one machine."""
