"""The choice among a machine's transports: `auto`, its rules, and the report of `kvroom doctor`."""
