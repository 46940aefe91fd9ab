"""Results of the trace: labels, the groups they form, and what must stay in balance."""
