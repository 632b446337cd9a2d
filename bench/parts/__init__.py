"""Parts that the benchmarks share: contests, pairs of processes, and third-party engines that are driven directly."""
