"""CUDA: descriptors, schedule rules, lowering, and the way from CUDA C to device code."""
