"""Attacks on trained models, and what they prove about their privacy."""
