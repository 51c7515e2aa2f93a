"""Memory per device, worked out before anything is loaded."""
