"""LoRA adapters: trained on a frozen base, merged into it."""
