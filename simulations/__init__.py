"""Populations of virtual devices and the fleet that trains them."""
