"""The gateway: a fleet of real devices, served over gRPC."""
