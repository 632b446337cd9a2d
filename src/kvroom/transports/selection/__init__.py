"""Choice among the transports of a machine: `auto`, the rules that it goes by, and what `kvroom doctor` reports."""
