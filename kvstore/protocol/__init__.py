"""The wire: messages, framing, the session state machine. No I/O."""
