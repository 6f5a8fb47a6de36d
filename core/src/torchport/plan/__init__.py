"""From what is installed and asked for to a `Plan`: discovery, registry, topology, selection."""
