"""How engines talk to the daemon."""
