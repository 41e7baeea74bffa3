"""Schedule rules for GPUs, one family a file. A rule takes an unscheduled PrimFunc and returns one whose loops are
bound to threads, or the reason why it does not apply."""
