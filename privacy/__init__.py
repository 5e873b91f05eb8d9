"""eDP-SGD, clipping, noise, the ledger and the accountants."""
