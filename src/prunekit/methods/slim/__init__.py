"""Network Slimming (Liu et al., ICCV 2017)."""
