"""One schema for everything that can be set: flags, YAML keys, environment variables and documentation."""
