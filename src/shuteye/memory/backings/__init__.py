"""Where a tag's bytes live while they are not in memory: the image, a spill file on disk, or host memory.

Knows nothing of when that is.
"""
