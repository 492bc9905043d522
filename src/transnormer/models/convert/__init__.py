"""Foreign checkpoint layouts: one file a layout, each with the name map that round-trips."""
