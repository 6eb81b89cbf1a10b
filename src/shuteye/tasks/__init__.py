"""What an engine can be for: each task a folder, with the same file names in each."""
