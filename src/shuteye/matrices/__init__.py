"""Weight matrices in memory: how they lie there, and how they get there from a checkpoint. No torch."""
