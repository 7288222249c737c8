"""Teacher, student and the taps that read tokens and attention from timm's VisionTransformer family."""
