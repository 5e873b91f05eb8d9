"""The device agent: what runs on a person's device beside its training code."""
