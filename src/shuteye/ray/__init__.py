"""Replicas on Ray Serve that sleep and wake through one handle; only `deployment` imports Ray."""
