"""prunekit makes trained PyTorch networks smaller and really faster, with proof."""
