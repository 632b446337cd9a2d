"""Listening sockets, and a bound on the log lines that callers can cause."""
