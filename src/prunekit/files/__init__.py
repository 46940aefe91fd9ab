"""What any file needs, ours or somebody else's: atomic writes, archives, pickles that are read without being run."""
