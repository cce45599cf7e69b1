"""What a checkpoint says of adapters: worked out, and written into its folder."""
