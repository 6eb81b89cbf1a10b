"""The KV cache: which blocks hold what, and the tensors over them. Knows nothing of requests."""
