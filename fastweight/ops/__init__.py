"""Pure tensor functions: the memories themselves, without parameters."""
