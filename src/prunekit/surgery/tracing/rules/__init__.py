"""Tables: what each ATen op does to channel labels, one file a family of ops."""
