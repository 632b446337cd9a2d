"""From a host and a port to a connection: names are resolved, and all of their addresses are tried."""
