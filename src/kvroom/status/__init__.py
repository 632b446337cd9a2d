"""What can be seen of one manager over HTTP, in whatever process it lives. Nothing here changes a room."""
