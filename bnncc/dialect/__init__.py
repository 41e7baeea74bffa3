"""The binary dialect: Relax operators on packed bits, their types, their meaning in NumPy and as TE computes."""
