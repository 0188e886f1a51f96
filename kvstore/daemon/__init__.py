"""The data socket: sessions over a Unix socket, and their life."""
