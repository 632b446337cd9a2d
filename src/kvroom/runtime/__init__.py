"""The loop thread that owns the rooms, and everything around it: links, driver, fences, handles and the manager."""
