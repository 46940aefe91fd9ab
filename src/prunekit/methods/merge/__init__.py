"""Neuron Merging (Kim et al., NeurIPS 2020) and its stronger relatives."""
