"""What the benchmarks have in common: contests, pairs of processes, and other people's parts driven bare."""
