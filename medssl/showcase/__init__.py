"""Pages that show what a network is about to be shown."""
