"""Training: one loop with Network Slimming's sparsity that can be interrupted and resumed, on one process or many."""
