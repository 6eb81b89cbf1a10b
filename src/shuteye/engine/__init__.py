"""The engine: what runs next, when the gate is open, and how callers reach it."""
