"""What the methods are judged by: HF PEFT, what AdapterHub's package computed, the papers' equations.

`PYTHONPATH=tests:tests/shared python -m judges` prints how far from them each method is.
"""
