"""Reading and writing files of any origin: atomic writes, archives, pickles inspected without being run."""
