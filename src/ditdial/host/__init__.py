"""What we know of diffusers, accelerate and peft."""
