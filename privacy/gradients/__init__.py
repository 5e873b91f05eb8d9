"""The eDP-SGD engine: from one backward pass to clipped sums, for one model or many."""
