"""Ways of running a gated network.

masked     as it was trained: exact, and no faster than without gates
gather     one image at a time: only the weights of the channels it keeps are collected and used; exact
buckets    any batch: a few static sub-networks and a router that sends each image to one; an approximation
auto       whichever of these is fastest here, measured
"""
