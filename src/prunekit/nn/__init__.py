"""Modules that stay in a network after surgery: padding, selection, gates, buckets."""
