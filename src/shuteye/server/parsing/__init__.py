"""Reads what a model writes, as it comes: reasoning, content and tool calls."""
