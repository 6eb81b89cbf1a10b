"""HTTP, whatever the route: keys, limits, errors, events."""
