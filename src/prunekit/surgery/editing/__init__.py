"""From a plan to a smaller network. Nothing else changes a tensor's shape."""
