"""LiZA with Memory-as-Gate: its cases for the laws, and what only it promises."""

from fastweight.mixers.liza import LizaConfig

WINDOW = {"num_heads": 4, "num_kv_heads": 2, "memory_window": 6}
# With sinks, or without a window, softmax sees the first tokens for ever: the frozen law, which wants a layer that
# forgets them, is not for those; test_liza_reach.py has the others over them.
CASES = {
    "off": LizaConfig(num_heads=4, num_kv_heads=2, window=6),
    "window": LizaConfig(mag_weight=0.3, **WINDOW),
    "memory": LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0, positions="rope", output_norm="rms"),
    "learned": LizaConfig(mag_weight=0.2, mag="learned", qk_norm="head", feature_map="softmax", gated=False, **WINDOW),
    "order2": LizaConfig(mag_weight=0.3, order=2, feature_map="identity", **WINDOW),
    "order3": LizaConfig(mag_weight=1.0, num_heads=2, order=3, trick="combined", gated=False),
    "hedgehog": LizaConfig(mag_weight=0.3, feature_map="hedgehog", feature_dim=6, conv_width=3, gated=False, **WINDOW),
}
