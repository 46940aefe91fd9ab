"""Modules that stay in a network after surgery: padding, selections, gates, buckets."""
