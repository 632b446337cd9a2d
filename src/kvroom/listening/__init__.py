"""Sockets that listen, and a bound on what their callers can make this process log."""
