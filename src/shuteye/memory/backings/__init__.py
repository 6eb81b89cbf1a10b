"""memory/backings"""
