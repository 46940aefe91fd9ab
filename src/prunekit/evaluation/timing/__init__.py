"""Times of layers and whole networks on this machine, and a model of time from them."""
