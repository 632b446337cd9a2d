"""What shows that the rest is right: the explorer, the oracle, the conformance suite. Users may run it, too."""
