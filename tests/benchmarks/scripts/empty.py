"""Does nothing: what it takes to launch it is the launcher's own."""
