"""Transcripts of speech."""
