"""The only part with a loop, threads and a clock: what the pure parts decide is carried out here."""
