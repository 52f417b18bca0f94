"""Which values a quantized weight can take, and how its input is rounded."""
