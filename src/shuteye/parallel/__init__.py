"""Ranks that share one model: which part each holds, and how they speak to each other."""
