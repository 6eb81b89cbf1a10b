"""How checkpoints are stored: read, and turned into what the builder takes."""
