"""Who is sampled, and how their updates are combined."""
