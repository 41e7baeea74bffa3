"""Relax → Relax, one pass a file; `pipeline.py` is the list."""
