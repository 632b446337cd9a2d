"""Plans: from two layouts and two page lists to the blocks to copy. Pure NumPy, no I/O."""
