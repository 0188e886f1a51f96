"""Where chunks live, and what every tier promises."""
