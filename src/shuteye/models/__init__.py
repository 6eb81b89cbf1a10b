"""Checkpoints to images, images to models; the only package that imports transformers."""
