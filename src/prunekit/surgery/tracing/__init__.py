"""From a network to its graph: the recorder, the rules of the ops, and the probe for written-in sizes."""
