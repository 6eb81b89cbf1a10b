"""One rank at work: batches, sampling, and the worker that owns the rank's memory."""
