"""Machines to compile for: their descriptors, schedule rules, object code, and the linking of artifacts."""
