"""Contest runs: train within a budget, pack under a cap, score the file from disk, and account for every step."""
