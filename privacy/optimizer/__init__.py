"""EDPSGD, the optimiser for one model, and the parts that it shares with the fleet."""
