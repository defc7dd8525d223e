"""Contest runs: train within a budget, pack under a cap, score the file from disk, and account for every step.

Nothing is imported here: the scorer lives in this package too, and its program must not hold what only training needs.
"""
