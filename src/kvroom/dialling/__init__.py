"""Connections to a host and port: names are resolved, and all of their addresses are tried."""
