"""What the trace found: labels, the groups they form, and what must stay in balance."""
