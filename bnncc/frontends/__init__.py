"""Front ends: what a user's model comes in as, turned into one Relax function with float semantics."""
