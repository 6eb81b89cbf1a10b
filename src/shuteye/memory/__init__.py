"""Bytes and addresses: layouts, arenas, weight images, and who gives memory back when.

Knows nothing of models or requests.
"""
