"""What releases something with noise: sums of updates, independent or correlated; noise itself."""
