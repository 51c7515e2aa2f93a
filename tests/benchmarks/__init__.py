"""Speed and memory beside other implementations and beside the limit. `make bench` runs all; each file is one question.

`PYTHONPATH=tests python -m benchmarks.step_time --quick` runs one of them.
"""
