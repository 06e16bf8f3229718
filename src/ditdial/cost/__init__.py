"""What a forward pass multiplies, in closed form."""
