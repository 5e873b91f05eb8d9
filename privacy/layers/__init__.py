"""Tracked layers: torch's own, by name and parameters, that keep factors in place of gradients."""
