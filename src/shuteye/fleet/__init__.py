"""Many models on one byte budget: which of them are awake, decided without torch, input or output, or a clock."""
