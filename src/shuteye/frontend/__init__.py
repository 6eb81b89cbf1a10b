"""The callers' side of an engine: `LLM`, `AsyncEngine`, and the client they share. No torch."""
