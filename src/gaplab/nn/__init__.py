"""Networks whose toggles are injected as layer factories."""
